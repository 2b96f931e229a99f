"""Pieces of all chunks to the files of a split, in the order of the source.

Shards are cut at `shard_tokens` wherever the chunks end, so that neither chunks nor the number of processes
show in what is written. Memory: one block.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.manifest import SplitRecord
from moe_runtime.data.task import Tick
from moe_runtime.data.writer import SplitWriter

BLOCK_TOKENS = 4 * 1024 * 1024
BLOCK_DOCUMENTS = 256 * 1024


def assemble(
    pieces: Path, num_chunks: int, split: str, folder: Path, dtype: str, shard_tokens: int, tick: Tick
) -> SplitRecord:
    """Write one split from its pieces.

    Args:
        pieces: the folder of all pieces.
        folder: where the split goes.
        tick: called with the tokens written.
    """
    facts = [json.loads((pieces / f"{index:06d}.json").read_bytes())[split] for index in range(num_chunks)]
    is_masked = any(one["targets"] < one["tokens"] for one in facts)
    done = 0
    with SplitWriter(folder, split, dtype, shard_tokens, is_masked) as writer:
        for index, own in enumerate(facts):
            stem = pieces / f"{index:06d}_{split}"
            for lengths, parts in _documents(stem):
                writer.add_documents(lengths, parts, own["part_names"])
            for ids, targets in _tokens(stem, np.dtype(dtype).newbyteorder("<"), own["has_mask"]):
                writer.add_tokens(ids, targets)
                done += len(ids)
                tick(done)
        return writer.close(_totals(facts))


def _totals(facts: list[Mapping[str, Any]]) -> dict[str, int]:
    sums = {name: sum(one[name] for one in facts) for name in ("bytes", "fim_documents", "targets")}
    return sums | {"max_id": max((one["max_id"] for one in facts), default=0)}


def _documents(stem: Path) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint32]]]:
    with open(f"{stem}.lengths", "rb") as lengths, open(f"{stem}.parts", "rb") as parts:
        while len(block := np.fromfile(lengths, "<u8", BLOCK_DOCUMENTS)):
            yield block, np.fromfile(parts, "<u4", len(block))


def _tokens(
    stem: Path, dtype: Any, has_mask: bool
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
    with open(f"{stem}.ids", "rb") as ids, open(f"{stem}.targets" if has_mask else os.devnull, "rb") as marks:
        while len(block := np.fromfile(ids, dtype, BLOCK_TOKENS)):
            yield block, np.fromfile(marks, np.bool_, len(block)) if has_mask else None
