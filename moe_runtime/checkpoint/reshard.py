"""Optimizer state of any layout into the partitions of any other, reading only what this rank needs.

A partition that the checkpoint has just so (the same elements of the same parameters, moments in the same
form) is taken bit for bit, whichever rank saved it: a run that resumes in its own layout goes on exactly.
Any other is put together element by element (`flat_index`): masters are copied, moments are decoded and
stored again in this run's form, window by window, so that no rank ever holds more than its own share.

What is exact. Masters always. Moments from any form to FP32, from FP8 to BF16, and between equal forms in
FP32 and BF16. BF16 from FP32 is rounded to nearest; FP8 from either stochastically, as in a step.

FP8 to FP8. Blocks of 128 begin where the partition begins, so in another layout their borders move, and a
block may take its scale from another largest root. That changes no value that is still a normal number of
UE5M3 under the new scale: it has the same four significant bits, whatever power of two is over it. Below
that, sqrt(v) becomes one of its two neighbours in a grid of

    2^-17 x scale  <  2^-32 x the largest sqrt(v) of its new block           (`MOVED_BLOCK_BOUND`)

and m, which is kept in units of sqrt(v), changes by less than 28 times that. So state comes through any
layout bit for bit unless 128 neighbours differ by more than 2^29 in sqrt(v), 2^58 in v. Where borders stay
nothing can change at all.

Rejected: resharding offline into a layout-free form first, as others do. It reads and writes the whole
checkpoint twice before the first step, on a machine that has room for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_runtime.checkpoint.flat_index import FlatIndex, Run, spans_of
from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.manifest import PartitionEntry, Slot
from moe_runtime.checkpoint.optimizer import slots_of
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.stored_moments import (
    MASTER,
    NONE,
    masters_of,
    moments_of,
    steps_done,
    stored_form,
)
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.moments import BLOCK
from moe_runtime.parallel.zero_partition import Partition

# Change of sqrt(v) where blocks of FP8 moments move, in units of the largest sqrt(v) of the new block.
MOVED_BLOCK_BOUND = 2.0**-32
# Elements put together at a time: 12 bytes each.
_WINDOW = 8192 * BLOCK


@dataclass(frozen=True)
class Cut:
    """Where the state of one partition of this run comes from.

    Args:
        partition: from the ZeRO adapter.
        equal: the saved partition that is this one bit for bit, if there is one.
        runs: all its elements but the padding, in order.
        sources: every saved partition that takes part, each once; at least one.
    """

    partition: Partition
    equal: PartitionEntry | None
    runs: tuple[Run, ...]
    sources: tuple[PartitionEntry, ...]


def plan_cuts(
    checkpoint: Checkpoint, partitions: Sequence[Partition], moments: str, first_expert: int = 0
) -> list[Cut]:
    """Find everything that this rank's partitions need; reads the manifest only and changes nothing.

    Args:
        checkpoint: a verified checkpoint.
        partitions: this run's own, from the ZeRO adapter.
        moments: form in which this run keeps moments: fp32, bf16 or fp8.
        first_expert: global number of this rank's first local expert.

    Raises:
        CheckpointError: elements are missing, a parameter has another shape, or partitions are in no form
            that this version knows.
    """
    manifest = checkpoint.manifest
    if not manifest.partitions:
        raise CheckpointError(
            f"{checkpoint.path}: expected optimizer state, got weights alone; train.init_from takes those"
        )
    index = FlatIndex(manifest, checkpoint.path)
    layouts = list(manifest.layouts)
    cuts = []
    for partition in partitions:
        slots = slots_of(partition, first_expert)
        spans = spans_of(slots, partition.start, partition.end)
        runs = tuple(run for span in spans for run in index.runs(span))
        sources = tuple({id(run.source): run.source for run in runs}.values()) or manifest.partitions[:1]
        forms = {stored_form(manifest, source) for source in sources}
        if NONE in forms and len(forms) > 1:
            raise CheckpointError(
                f"{checkpoint.path}: optimizer group {partition.group}: expected moments of all partitions "
                "or of none, got some"
            )
        equal = _equal_one(sources, layouts, partition, slots) if forms == {moments} else None
        cuts.append(Cut(partition, equal, runs, sources))
    return cuts


def restore_cut(reader: SliceReader, cut: Cut, client: AdamW) -> None:
    """Fill a partition's master and moments.

    Args:
        cut: from `plan_cuts` over the reader's checkpoint.
        client: the optimizer over `cut.partition.master`.

    Raises:
        CheckpointError: a file does not hold what the manifest says, or the sources had done different
            numbers of steps.
    """
    if cut.equal is not None:
        _restore_equal(reader, cut.partition, cut.equal, client)
        return
    master = cut.partition.master
    with torch.no_grad():
        for start, stop, runs in _windows(cut):
            window = torch.zeros(stop - start)
            for to, source, at, count in runs:
                window[to : to + count] = masters_of(reader, source, at, count)
            master[start:stop].copy_(window)
    if stored_form(reader.checkpoint.manifest, cut.sources[0]) == NONE:
        client.load_native_state(master, {})
        return
    steps = {steps_done(reader, source) for source in cut.sources}
    if len(steps) > 1:
        raise CheckpointError(
            f"{reader.checkpoint.path}: optimizer group {cut.partition.group}: expected one number of steps, "
            f"got {sorted(steps)}"
        )
    client.load_moments(master, steps.pop(), _moment_windows(reader, cut))


def _equal_one(
    sources: Sequence[PartitionEntry],
    layouts: Sequence[tuple[Slot, ...]],
    partition: Partition,
    slots: tuple[Slot, ...],
) -> PartitionEntry | None:
    """The saved partition with the same elements at the same places."""
    for source in sources:
        cut = (source.group, source.start, source.end, layouts[source.layout])
        if cut == (partition.group, partition.start, partition.end, slots):
            return source
    return None


def _restore_equal(reader: SliceReader, partition: Partition, saved: PartitionEntry, client: AdamW) -> None:
    tensors = {key: reader.whole(saved.file, f"{saved.group}.{key}") for key in saved.keys}
    with torch.no_grad():
        partition.master.copy_(tensors.pop(MASTER))
    client.load_native_state(partition.master, tensors)


def _moment_windows(reader: SliceReader, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
    """(m, v) of consecutive windows, zeros where the padding is."""
    for start, stop, runs in _windows(cut):
        mean, square = torch.zeros(stop - start), torch.zeros(stop - start)
        for to, source, at, count in runs:
            part = slice(to, to + count)
            mean[part], square[part] = moments_of(reader, source, at, count)
        yield mean, square


def _windows(cut: Cut) -> Iterator[tuple[int, int, list[tuple[int, PartitionEntry, int, int]]]]:
    """(start, stop, runs within as (place in the window, source, place in the source, count))."""
    size = cut.partition.end - cut.partition.start
    borders = [*range(0, size, _WINDOW), size]
    for start, stop in pairwise(borders):
        inside = []
        for run in cut.runs:
            low, high = max(run.to, start), min(run.to + run.count, stop)
            if low < high:
                inside.append((low - start, run.source, run.at + low - run.to, high - low))
        yield start, stop, inside
