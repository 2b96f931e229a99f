"""Saving and finding the checkpoints of a run: whole or not at all, and alike on every rank.

    1  every rank says how many bytes it brings; too few free bytes end it here
    2  rank 0 makes `.tmp-step_N`; every rank writes its own files into it, fsyncs and hashes them
    3  the hashes are gathered; rank 0 writes the manifest last, fsyncs file and folder
    4  rank 0 renames the folder to `step_N` and fsyncs its parent; older checkpoints are pruned

A kill at any moment leaves either the old state or the new one: before the rename nothing reads the
folder, after it the folder is complete. Whatever goes wrong on one rank is known to all before the next
step, the temporary folder is removed, and `save` returns a `SaveFailed` on every rank: a full disk costs
a checkpoint, not a training run. Only the death of a rank raises, out of the collective that it left.

All ranks must see the same folder (a shared file system, or one machine).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_runtime.checkpoint.disk import (
    free_bytes,
    fsync_folder,
    make_empty,
    remove,
    replace_folder,
    write_bytes,
    write_tensors,
)
from moe_runtime.checkpoint.folder import (
    CHECKPOINTS_DIR,
    TMP_PREFIX,
    Found,
    find_latest_good,
    step_name,
)
from moe_runtime.checkpoint.formats import FORMAT
from moe_runtime.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest
from moe_runtime.checkpoint.optimizer import PartitionState
from moe_runtime.checkpoint.retain import prune, remove_all, remove_leftovers
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers

# Room that the check for free space leaves: the file system's own blocks, headers and the manifest.
_SLACK_BYTES_PER_FILE = 16 << 10
_HEADER_BYTES_PER_TENSOR = 512
_KINDS = ("weights", "optimizer", "ema")


@dataclass(frozen=True)
class Contribution:
    """What one rank puts into a checkpoint.

    Args:
        weights: canonical name -> tensor, from `weights.weights_to_save`: one rank only writes each.
        ema: canonical name -> average of the weight over steps, likewise; empty where none is kept.
        partitions: this rank's share of the optimizer, from `optimizer.capture_partition`.
        extras: file name -> bytes that the checkpoint only carries, such as `tokenizer.json`; one rank
            only gives each.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    partitions: Sequence[PartitionState] = ()
    extras: Mapping[str, bytes] = field(default_factory=dict)
    ema: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank's files take, about."""
        tensors = [*self.weights.values(), *self.optimizer().values(), *self.ema.values()]
        headers = _SLACK_BYTES_PER_FILE + _HEADER_BYTES_PER_TENSOR * len(tensors)
        return sum(t.nbytes for t in tensors) + sum(len(data) for data in self.extras.values()) + headers

    def optimizer(self) -> dict[str, Tensor]:
        """The tensors of all partitions, as their file names them."""
        return {name: tensor for part in self.partitions for name, tensor in part.named_tensors().items()}


@dataclass(frozen=True)
class SaveMeta:
    """What a checkpoint says about the run; the same on every rank.

    Args:
        tokens: tokens trained on.
        config: the whole resolved run configuration, as JSON.
        layout: pp, dp, ep, world_size, schedule.
        state: counters and other JSON that the loop wants back.
        sequences: sequences trained on.
        skipped: ranges of sequences that training passes over: (first, how many).
        schedules, rng: see `Manifest`.
    """

    tokens: int
    config: dict[str, Any]
    layout: dict[str, int | str]
    state: dict[str, Any] = field(default_factory=dict)
    sequences: int = 0
    skipped: Sequence[tuple[int, int]] = ()
    schedules: dict[str, float] = field(default_factory=dict)
    rng: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk.

    Args:
        path: its folder.
        num_bytes: about what it takes, all ranks together.
        warning: why older checkpoints could not be removed; None if they were.
    """

    path: Path
    num_bytes: int
    warning: str | None = None


@dataclass(frozen=True)
class SaveFailed:
    """No checkpoint was made and nothing is left of the attempt; training may go on.

    Args:
        message: one line: what failed, where, needed and free bytes if the disk is full.
    """

    message: str


class CheckpointStore:
    """The checkpoints of one run folder.

    Making a store removes what a killed save left, so only the run that owns the folder makes one;
    readers use `folder.find_latest_good` and `folder.open_checkpoint`.

    Args:
        run_dir: the run folder; checkpoints go to `run_dir/checkpoints`.
        peers: all ranks of the run.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the folder cannot be written; on every rank.
    """

    def __init__(self, run_dir: Path | str, peers: Peers, keep: int) -> None:
        self.dir = Path(run_dir) / CHECKPOINTS_DIR
        self.peers = peers
        self.keep = keep
        self._known_bad: set[str] = set()
        failure = self._on_first(lambda: remove_leftovers(self.dir))
        if failure is not None:
            raise CheckpointError(f"{self.dir}: what a killed save left cannot be removed: {failure}")

    def latest_good(self) -> Found:
        """The newest checkpoint that verifies, alike on every rank, and what was passed over."""
        found = find_latest_good(self.dir, self.peers)
        self._known_bad = {damaged.path.name for damaged in found.skipped}
        return found

    def clear(self) -> None:
        """Remove every checkpoint, for a run that starts over.

        Raises:
            CheckpointError: one cannot be removed; on every rank.
        """
        failure = self._on_first(lambda: remove_all(self.dir))
        if failure is not None:
            raise CheckpointError(f"{self.dir}: cannot be cleared: {failure}")

    def save(self, step: int, own: Contribution, meta: SaveMeta) -> Saved | SaveFailed:
        """Write a checkpoint; the same result on every rank.

        Args:
            step: optimizer steps done; a checkpoint of the same step is replaced.
            own: what this rank writes.
            meta: what the manifest says about the run.
        """
        needed, failure = self._check_space(own)
        tmp = self.dir / f"{TMP_PREFIX}{step_name(step)}"
        written: dict[str, Any] = {}
        if failure is None:
            failure = self._on_first(lambda: make_empty(tmp))
        if failure is None:
            written, failure = self._write_own(tmp, own)
        if failure is None:
            said = self.peers.gather_json(written)
            failure = self._on_first(lambda: self._commit(tmp, step, said, meta))
        if failure is not None:
            self._on_first(lambda: remove(tmp))
            return SaveFailed(self._explain(failure, needed))
        self._known_bad.discard(step_name(step))
        warning = self._on_first(lambda: prune(self.dir, self.keep, self._known_bad))
        return Saved(self.dir / step_name(step), needed, warning)

    def _check_space(self, own: Contribution) -> tuple[int, str | None]:
        """(bytes of all ranks together, why they cannot fit)."""
        said = self.peers.gather_json([own.num_bytes, free_bytes(self.dir)])
        needed = sum(num_bytes for num_bytes, _ in said)
        free = min(have for _, have in said)
        return needed, None if needed <= free else "disk full"

    def _explain(self, failure: str, needed: int) -> str:
        if "disk full" in failure or "No space left" in failure or "os error 28" in failure:
            free = self.peers.first_says(free_bytes(self.dir))
            return f"disk full: need {_megabytes(needed)}, have {_megabytes(free)} in {self.dir}"
        return f"checkpoint not written to {self.dir}: {failure}"

    def _agree(self, action: Callable[[], object]) -> str | None:
        """Run a local action everywhere; the first failure, on every rank."""
        failure: str | None = None
        try:
            action()
        except Exception as error:  # whatever it was, the others wait to hear of it
            failure = f"{type(error).__name__}: {error}"
        said = self.peers.gather_json(failure)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)

    def _on_first(self, action: Callable[[], object]) -> str | None:
        """Run an action on rank 0 alone; its failure, on every rank."""
        return self._agree(action if self.peers.is_first else lambda: None)

    def _write_own(self, tmp: Path, own: Contribution) -> tuple[dict[str, Any], str | None]:
        """Write this rank's files; (what the manifest needs of them, first failure of any rank)."""
        files: dict[str, FileEntry] = {}
        weights_file, optimizer_file, ema_file = (
            f"{kind}-{self.peers.rank:05d}.safetensors" for kind in _KINDS
        )

        def write() -> None:
            if own.weights:
                files[weights_file] = write_tensors(tmp / weights_file, "weights", own.weights)
            if own.partitions:
                files[optimizer_file] = write_tensors(tmp / optimizer_file, "optimizer", own.optimizer())
            if own.ema:
                files[ema_file] = write_tensors(tmp / ema_file, "ema", own.ema)
            for name, data in own.extras.items():
                files[name] = write_bytes(tmp / name, data)

        failure = self._agree(write)
        said = {
            "files": {name: entry.model_dump(mode="json") for name, entry in files.items()},
            "partitions": [_describe(part, optimizer_file) for part in own.partitions],
        }
        return said, failure

    def _commit(self, tmp: Path, step: int, written: list[Any], meta: SaveMeta) -> None:
        """Write the manifest and rename; on rank 0 only."""
        manifest = _join(step, written, meta)
        write_bytes(tmp / MANIFEST_NAME, manifest.to_bytes())
        fsync_folder(tmp)
        replace_folder(tmp, self.dir / step_name(step))


def _describe(part: PartitionState, file: str) -> dict[str, Any]:
    """The manifest's entry of a partition, its layout still written out."""
    return {
        "group": part.group,
        "start": part.start,
        "end": part.end,
        "file": file,
        "keys": list(part.tensors),
        "scalars": part.scalars,
        "layout": [slot.model_dump(mode="json") for slot in part.layout],
    }


def _join(step: int, written: list[Any], meta: SaveMeta) -> Manifest:
    """One manifest from what every rank wrote, in rank order; equal layouts are stored once."""
    files: dict[str, Any] = {}
    layouts: list[Any] = []
    partitions = []
    for rank, said in enumerate(written):
        twice = files.keys() & said["files"].keys()
        if twice:
            raise CheckpointError(f"{min(twice)} was written by rank {rank} and by one before it")
        files.update(said["files"])
        for part in said["partitions"]:
            if part["layout"] not in layouts:
                layouts.append(part["layout"])
            partitions.append({**part, "rank": rank, "layout": layouts.index(part["layout"])})
    fields = {
        "format": FORMAT,
        "position": {
            "step": step,
            "tokens": meta.tokens,
            "sequences": meta.sequences,
            "skipped": [list(span) for span in meta.skipped],
        },
        "schedules": meta.schedules,
        "rng": meta.rng,
        "config": meta.config,
        "layout": meta.layout,
        "state": meta.state,
        "files": files,
        "layouts": layouts,
        "partitions": partitions,
    }
    return Manifest.model_validate_json(json.dumps(fields, allow_nan=False))


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
