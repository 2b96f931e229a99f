"""Elements find each other through their addresses, whatever the two cuts are."""

import hashlib
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.checkpoint.flat_index import FlatIndex, spans_of
from moe_runtime.checkpoint.manifest import (
    FileEntry,
    Manifest,
    PartitionEntry,
    Position,
    Slot,
    TensorEntry,
    optimizer_file,
)

NUM_EXPERTS = 4
SHAPES = {
    "embed.weight": (7, 5),
    "norm.weight": (3,),
    "layers.1.attn.q.weight": (4, 9),
    "head.weight": (13, 1),
}
STACKS = {"layers.1.moe.experts.gate_up": (5, 3), "layers.2.moe.experts.down": (2, 11)}


@cache
def _id(param: str, expert: int | None, index: int) -> int:
    """A number that only this element has."""
    return int.from_bytes(hashlib.sha256(f"{param} {expert} {index}".encode()).digest()[:6], "big")


def _layouts(order: random.Random, ep: int) -> list[tuple[Slot, ...]]:
    """Flat groups of one run: what is no expert in one or two groups of any order, experts by ep rank."""
    names = list(SHAPES)
    order.shuffle(names)
    border = order.randint(1, len(names))
    groups = [_laid(names[:border]), _laid(names[border:])]
    local = NUM_EXPERTS // ep
    stacks = list(STACKS)
    order.shuffle(stacks)
    groups += [_laid(stacks, first, local) for first in range(0, NUM_EXPERTS, local)]
    return [group for group in groups if group]


def _laid(names: list[str], first_expert: int | None = None, local: int = 1) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for name in names:
        shape = SHAPES[name] if first_expert is None else (local, *STACKS[name])
        slots.append(Slot(param=name, shape=shape, offset=offset, first_expert=first_expert))
        offset += math.prod(shape)
    return tuple(slots)


def _cuts(slots: tuple[Slot, ...], owners: int) -> list[tuple[int, int]]:
    """Equal partitions, the last of them padded."""
    total = sum(math.prod(slot.shape) for slot in slots)
    size = -(-total // owners)
    return [(owner * size, owner * size + size) for owner in range(owners)]


def _content(slots: tuple[Slot, ...], start: int, end: int) -> np.ndarray:
    """What a partition holds, slowly: element after element; zeros in the padding."""
    flat = []
    for slot in slots:
        for index in range(math.prod(slot.shape)):
            if slot.first_expert is None:
                flat.append(_id(slot.param, None, index))
            else:
                each = math.prod(slot.shape[1:])
                flat.append(_id(slot.param, slot.first_expert + index // each, index % each))
    flat += [0] * (end - len(flat))
    return np.array(flat[start:end], dtype=np.int64)


def _saved(
    layouts: list[tuple[Slot, ...]], owners: int
) -> tuple[Manifest, dict[tuple[int, str], np.ndarray]]:
    """The manifest of a run and what its partitions hold, by (rank, group)."""
    files, parts, held, rank = {}, [], {}, 0
    for number, slots in enumerate(layouts):
        for start, end in _cuts(slots, owners):
            entry = TensorEntry(shape=(end - start,), dtype="F32")
            file = FileEntry(kind="optimizer", bytes=10**6, sha256="0" * 64, tensors={"group.master": entry})
            files[optimizer_file(rank)] = file
            parts.append(
                PartitionEntry(
                    rank=rank,
                    group="group",
                    start=start,
                    end=end,
                    layout=number,
                    file=optimizer_file(rank),
                    keys=("master",),
                )
            )
            held[rank, "group"] = _content(slots, start, end)
            rank += 1
    position = Position(step=1, tokens=1)
    manifest = Manifest(
        position=position, config={}, layout={}, files=files, layouts=tuple(layouts), partitions=tuple(parts)
    )
    return manifest, held


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ep=st.sampled_from([1, 2, 4]),
    other_ep=st.sampled_from([1, 2, 4]),
    owners=st.integers(1, 6),
    other_owners=st.integers(1, 6),
)
def test_every_element_of_a_partition_is_found_in_any_other_cut(
    seed: int, ep: int, other_ep: int, owners: int, other_owners: int
) -> None:
    order = random.Random(seed)
    manifest, held = _saved(_layouts(order, ep), owners)
    index = FlatIndex(manifest, Path("here"))
    for slots in _layouts(order, other_ep):
        for start, end in _cuts(slots, other_owners):
            found = np.zeros(end - start, dtype=np.int64)
            for span in spans_of(slots, start, end):
                for run in index.runs(span):
                    source = held[run.source.rank, run.source.group]
                    found[run.to : run.to + run.count] = source[run.at : run.at + run.count]
            np.testing.assert_array_equal(found, _content(slots, start, end))
