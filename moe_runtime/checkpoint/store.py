"""Saving and finding the checkpoints of a run: whole or not at all, and alike on every rank.

    1  every rank says how many bytes it brings; too few free bytes end it here
    2  rank 0 makes `.tmp-step_N`; every rank writes its own files into it, and reads them back from the disk
    3  the hashes are gathered; rank 0 writes the manifest last, fsyncs file and folder
    4  rank 0 renames the folder to `step_N` and fsyncs its parent; older checkpoints are pruned

A kill at any moment leaves either the old state or the new one: before the rename nothing reads the
folder, after it the folder is complete. Whatever goes wrong on one rank is known to all before the next
step, the temporary folder is removed, and `save` returns a `SaveFailed` on every rank: a full disk costs
a checkpoint, not a training run. Only the death of a rank raises, out of the collective that it left.

`save` blocks whoever calls it until the checkpoint is on disk; in training that is a thread of
`background.BackgroundSaver`, which gives the store a process group of its own.

All ranks must see the same folder (a shared file system, or one machine).
"""

import errno
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
from moe_runtime.checkpoint.header import about_file
from moe_runtime.checkpoint.manifest import MANIFEST_NAME, FileEntry, Kind, Manifest, optimizer_file
from moe_runtime.checkpoint.optimizer import PartitionState
from moe_runtime.checkpoint.retain import prune, remove_all, remove_leftovers
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers

# Room that the check for free space leaves: the file system's own blocks, headers and the manifest.
_SLACK_BYTES_PER_FILE = 16 << 10
_HEADER_BYTES_PER_TENSOR = 512
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL = "disk full"


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
        at: called by every rank's `save` as `write`, in the middle of its first file, and as `rename`, when
            nothing but the rename is left; may raise. A save behind the training calls it with nothing when
            it is done.

    Raises:
        CheckpointError: the folder cannot be written; on every rank.
    """

    def __init__(
        self, run_dir: Path | str, peers: Peers, keep: int, at: Callable[[str], object] | None = None
    ) -> None:
        self.dir = Path(run_dir) / CHECKPOINTS_DIR
        self.peers = peers
        self.keep = keep
        self.at: Callable[[str], object] = at or (lambda point: None)
        self.waits_for_others = False  # of the save that runs
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
            failure = self._agree(lambda: written.update(self._write_own(tmp, step, own)))
        if failure is None:
            said = self.peers.first_hears(written, range(self.peers.world_size))
            failure = self._agree(lambda: self._commit(tmp, step, said, meta))
        if failure is not None:
            self._on_first(lambda: remove(tmp))
            return SaveFailed(self._explain(failure, needed))
        self._known_bad.discard(step_name(step))
        warning = self._on_first(lambda: prune(self.dir, self.keep, self._known_bad))
        return Saved(self.dir / step_name(step), needed, warning)

    def _check_space(self, own: Contribution) -> tuple[int, str | None]:
        """(bytes of all ranks together, why they cannot be written)."""
        free: list[int] = []
        failure = self._agree(lambda: free.append(free_bytes(self.dir)))
        said = self.peers.gather_json([own.num_bytes, *free])
        needed = sum(own_bytes for own_bytes, *_ in said)
        if failure is None and needed > min(have for _, have in said):
            failure = _DISK_FULL
        return needed, failure

    def _explain(self, failure: str, needed: int) -> str:
        if _DISK_FULL not in failure:
            return f"checkpoint not written to {self.dir}: {failure}"
        free: list[int] = []
        self._on_first(lambda: free.append(free_bytes(self.dir)))
        have = self.peers.first_says(free)
        room = f", have {_megabytes(have[0])}" if have else ""
        return f"{failure}: need {_megabytes(needed)}{room} in {self.dir}"

    def _agree(self, action: Callable[[], object]) -> str | None:
        """Run a local action everywhere; the first failure, on every rank."""
        failure: str | None = None
        try:
            action()
        except Exception as error:  # whatever it was, the others wait to hear of it
            failure = _reason(error)
        self.waits_for_others = True
        said = self.peers.gather_json(failure)
        self.waits_for_others = False
        return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None), None)

    def _on_first(self, action: Callable[[], object]) -> str | None:
        """Run an action on rank 0 alone; its failure, on every rank."""
        return self._agree(action if self.peers.is_first else lambda: None)

    def _write_own(self, tmp: Path, step: int, own: Contribution) -> dict[str, Any]:
        """Write this rank's files; gives what the manifest needs of them."""
        files: dict[str, FileEntry] = {}
        parts: dict[Kind, Mapping[str, Tensor]] = {
            "weights": own.weights,
            "optimizer": own.optimizer(),
            "ema": own.ema,
        }
        written = {self._file_of(kind): (kind, tensors) for kind, tensors in parts.items() if tensors}
        for name, (kind, tensors) in written.items():
            midway = (lambda: None) if files else lambda: self.at("write")
            files[name] = write_tensors(tmp / name, kind, tensors, about_file(name, step), midway)
        if not written:
            self.at("write")
        for name, data in own.extras.items():
            files[name] = write_bytes(tmp / name, data)
        return {
            "files": {name: entry.model_dump(mode="json") for name, entry in files.items()},
            "partitions": [_describe(part, optimizer_file(self.peers.rank)) for part in own.partitions],
        }

    def _file_of(self, kind: Kind) -> str:
        return f"{kind}-{self.peers.rank:05d}.safetensors"

    def _commit(self, tmp: Path, step: int, written: Mapping[int, Any], meta: SaveMeta) -> None:
        """Write the manifest and rename; on rank 0 only, the others stand by."""
        if not self.peers.is_first:
            self.at("rename")
            return
        manifest = _join(step, [written[rank] for rank in sorted(written)], meta)
        write_bytes(tmp / MANIFEST_NAME, manifest.to_bytes())
        fsync_folder(tmp)
        self.at("rename")
        replace_folder(tmp, self.dir / step_name(step))
        fsync_folder(self.dir.parent)  # the first checkpoint made the folder of all


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


def _reason(error: Exception) -> str:
    """One line: what went wrong, and `disk full` where that is what it was."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{_DISK_FULL} ({error.strerror})"
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
