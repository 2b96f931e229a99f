"""The whole optimizer state of a checkpoint by canonical names, whatever layout saved it: the slow oracle.

Every partition is read whole and decoded whole, then cut at its slots; nothing is shared with the reader that
resharding uses (`flat_index`, `slices`), so that tests can hold one against the other. It takes 12 bytes a
parameter of memory.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.manifest import Slot
from moe_runtime.checkpoint.optimizer import PartitionState, read_partitions
from moe_runtime.checkpoint.stored_moments import MASTER
from moe_runtime.checkpoint.weights import split_experts
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.moments import MEAN, RATIO_CODES, SQUARE, STEP, Fp8Moments

# Canonical name -> `master`, `exp_avg` and `exp_avg_sq`, FP32 in the parameter's shape; one tensor an expert.
Consolidated = dict[str, dict[str, Tensor]]


def consolidate(checkpoint: Checkpoint) -> Consolidated:
    """Every element of optimizer state that a checkpoint holds.

    Raises:
        CheckpointError: elements are in no partition, or two partitions say different things of one.
    """
    flat: dict[tuple[str, int | None, str], Tensor] = {}
    slots: dict[tuple[str, int | None], Slot] = {}
    for rank in sorted({part.rank for part in checkpoint.manifest.partitions}):
        for part in read_partitions(checkpoint, rank).values():
            values = _decoded(part)
            for slot in part.layout:
                slots[slot.param, slot.first_expert] = slot
                for kind, tensor in values.items():
                    _scatter(flat, slot, kind, tensor, part, checkpoint)
    whole: Consolidated = {}
    for (param, first, kind), tensor in flat.items():
        if bool(tensor.isnan().any()):
            raise CheckpointError(f"{checkpoint.path}: {kind} of {param}: elements are in no partition")
        shaped = tensor.view(slots[param, first].shape)
        named = split_experts({param: shaped}, first) if first is not None else {param: shaped}
        for name, values_of in named.items():
            whole.setdefault(name, {})[kind] = values_of
    return whole


def _decoded(part: PartitionState) -> dict[str, Tensor]:
    """Master, m and v of a whole partition, FP32."""
    tensors: dict[str, Any] = dict(part.tensors)
    tensors.pop(STEP, None)
    if RATIO_CODES in tensors:
        mean, square = Fp8Moments().read(tensors, 0, part.end - part.start)
        return {MASTER: tensors[MASTER], MEAN: mean, SQUARE: square}
    return {kind: tensor.to(torch.float32) for kind, tensor in tensors.items()}


def _scatter(
    flat: dict[tuple[str, int | None, str], Tensor],
    slot: Slot,
    kind: str,
    values: Tensor,
    part: PartitionState,
    checkpoint: Checkpoint,
) -> None:
    """Put what a partition has of one parameter where it belongs; NaN is what nobody has put yet."""
    begin, end = max(slot.offset, part.start), min(slot.offset + math.prod(slot.shape), part.end)
    if begin >= end:
        return
    blank = torch.full((math.prod(slot.shape),), torch.nan)
    whole = flat.setdefault((slot.param, slot.first_expert, kind), blank)
    there, own = whole[begin - slot.offset : end - slot.offset], values[begin - part.start : end - part.start]
    if bool((there != own).logical_and(~there.isnan()).any()):
        raise CheckpointError(f"{checkpoint.path}: {kind} of {slot.param}: two partitions differ")
    there.copy_(own)
