"""The moments of a saved partition as numbers, whatever form they were stored in.

    fp32, bf16   exp_avg and exp_avg_sq, a number an element
    fp8          codes and scales of blocks of 128 elements, counted from the start of the partition
    none         before the first step there are no moments

Every form decodes exactly: FP8 values have eight significant bits, which FP32 holds and even BF16 does. Part
of an FP8 partition is read by whole blocks, at most two more than the elements asked for fill.
"""

from torch import Tensor

from moe_runtime.checkpoint.manifest import Manifest, PartitionEntry
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.moments import (
    BLOCK,
    MEAN,
    RATIO_CODES,
    ROOT_CODES,
    ROOT_SCALE,
    SQUARE,
    STEP,
    Fp8Moments,
)

MASTER = "master"
NONE = "none"


def stored_form(manifest: Manifest, part: PartitionEntry) -> str:
    """`fp32`, `bf16`, `fp8` or `none`.

    Raises:
        CheckpointError: the partition's tensors are of no such form, or of another length than it.
    """
    count = part.end - part.start
    blocks = -(-count // BLOCK)
    listed = manifest.files[part.file].tensors
    entries = {key: listed[f"{part.group}.{key}"] for key in part.keys}
    found = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
    beside = {MASTER: ("F32", (count,))}
    forms = {
        NONE: beside,
        "fp32": beside | {STEP: ("F32", ()), MEAN: ("F32", (count,)), SQUARE: ("F32", (count,))},
        "bf16": beside | {STEP: ("F32", ()), MEAN: ("BF16", (count,)), SQUARE: ("BF16", (count,))},
        "fp8": beside
        | {
            STEP: ("F32", ()),
            RATIO_CODES: ("U8", (blocks, BLOCK)),
            ROOT_CODES: ("U8", (blocks, BLOCK)),
            ROOT_SCALE: ("U8", (blocks, 1)),
        },
    }
    for name, form in forms.items():
        if found == form:
            return name
    said = ", ".join(f"{key} {dtype} {list(shape)}" for key, (dtype, shape) in found.items())
    raise CheckpointError(
        f"optimizer state: group {part.group} of rank {part.rank}: expected master and moments of {count} "
        f"elements as fp32, bf16 or fp8, got {said or 'nothing'}"
    )


def steps_done(reader: SliceReader, part: PartitionEntry) -> int:
    """Optimizer steps that a partition has done.

    Raises:
        CheckpointError: that is no number of steps.
    """
    found = float(reader.whole(part.file, f"{part.group}.{STEP}"))
    if not (found >= 0 and found.is_integer()):
        raise CheckpointError(f"optimizer state: group {part.group} of rank {part.rank}: {found} steps")
    return int(found)


def masters_of(reader: SliceReader, part: PartitionEntry, at: int, count: int) -> Tensor:
    """Master weights at .. at + count - 1 of a partition, FP32 [count]."""
    return reader.rows(part.file, f"{part.group}.{MASTER}", at, at + count)


def moments_of(reader: SliceReader, part: PartitionEntry, at: int, count: int) -> tuple[Tensor, Tensor]:
    """(m, v) of elements at .. at + count - 1 of a partition that has moments, FP32 [count] each."""
    if MEAN in part.keys:
        mean, square = (
            reader.rows(part.file, f"{part.group}.{key}", at, at + count).float() for key in (MEAN, SQUARE)
        )
        return mean, square
    first, last = at // BLOCK, -(-(at + count) // BLOCK)
    state = {
        key: reader.rows(part.file, f"{part.group}.{key}", first, last)
        for key in (RATIO_CODES, ROOT_CODES, ROOT_SCALE)
    }
    skip = at - first * BLOCK
    mean, square = Fp8Moments().read(state, 0, skip + count)
    return mean[skip:], square[skip:]
