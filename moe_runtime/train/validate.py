"""Validation loss in the layout of the run: forwards only, the same sequences each time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.data.bits import ByteCounter, bits_per_byte
from moe_runtime.data.loader import BatchLoader
from moe_runtime.errors import DataError
from moe_runtime.model.phase import LOSS
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.schedule.forward_only import forward_only
from moe_runtime.train.open_data import ValidationSets
from moe_runtime.train.step import split_microbatches


@dataclass(frozen=True)
class Validation:
    """Mean over the targets of the validation sequences.

    Args:
        loss: nats per token; NaN of no targets.
        bits_per_byte: bits per byte of the text that these tokens stand for.
        sequences: how many were used.
        targets: tokens that were to be predicted.
        num_bytes: of the text that they stand for.
        sets: of a mixture, each set by itself.
    """

    loss: float
    bits_per_byte: float
    sequences: int
    targets: int = 0
    num_bytes: int = 0
    sets: Mapping[str, "Validation"] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Its keys in the record of a step."""
        own: dict[str, Any] = {"val_loss": self.loss, "val_bpb": self.bits_per_byte}
        sets = {name: one.record() for name, one in self.sets.items()}
        return own | ({"val_sets": sets} if sets else {})


def validate_sets(runtime: Runtime, sets: ValidationSets, counter: ByteCounter, wanted: int) -> Validation:
    """Measure on each set, and together: each set counts by its share in training.

    Args:
        wanted: sequences of each set.

    Raises:
        DataError: as `validate`.
    """
    found = {name: validate(runtime, loader, counter, wanted) for name, loader in sets.loaders.items()}
    if list(found) == [""]:
        return found[""]
    return together(found, sets.shares)


def together(found: Mapping[str, Validation], shares: Mapping[str, float]) -> Validation:
    """Loss of text drawn from sets in these shares of sequences.

    A target of a set stands for as many as a sequence of it has, so a set of many masked tokens weighs less
    than its share, as it does in training.
    """
    parts = [(shares[name] / one.sequences, one) for name, one in found.items() if name in shares]
    targets = sum(weight * one.targets for weight, one in parts)
    nats = sum(weight * one.targets * one.loss for weight, one in parts if one.targets)
    num_bytes = sum(weight * one.num_bytes for weight, one in parts)
    return Validation(
        loss=nats / targets if targets else math.nan,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
        sequences=sum(one.sequences for one in found.values()),
        targets=sum(one.targets for _, one in parts),
        num_bytes=sum(one.num_bytes for _, one in parts),
        sets=dict(found),
    )


def validate(runtime: Runtime, loader: BatchLoader, counter: ByteCounter, wanted: int) -> Validation:
    """Measure on at least `wanted` validation sequences, as many as fill every lane evenly.

    Args:
        loader: over the validation split; sequence numbers start at 0.
        counter: bytes of text that tokens stand for.

    Raises:
        DataError: a lane read what the model cannot take; on every rank alike.
    """
    mesh, size = runtime.mesh, runtime.config.batch.micro_batch_size
    directions = 2 if mesh.is_mirrored else 1
    per_lane = directions * math.ceil(wanted / (mesh.dp * size * directions))
    count = per_lane * size
    total = mesh.dp * count
    rows = runtime.peers.alike(lambda: loader.sequences(mesh.dp_rank * count, count), (DataError,))
    microbatches = split_microbatches(rows.to(runtime.device), size, directions)
    scalars = runtime.executor.run(forward_only(runtime.layout.placement, per_lane), microbatches, None)
    targets = rows[:, 1 : runtime.config.batch.seq_len + 1]
    # The loss comes from the last stage only; every row of the pipeline read the same bytes. It is the mean
    # over all tokens, those that are no targets counting 0.
    own = [scalars.totals.get(LOSS, 0.0) * size, counter.bytes_of(targets), int((targets >= 0).sum())]
    sums = torch.tensor(own, dtype=torch.float64)
    if mesh.world_size > 1:
        dist.all_reduce(sums, group=runtime.groups.control)
    num_bytes, num_targets = (round(float(value) / mesh.pp) for value in sums[1:])
    tokens = total * runtime.config.batch.seq_len
    loss = float(sums[0]) / total * (tokens / num_targets) if num_targets else math.nan
    nats = loss * num_targets
    return Validation(loss, bits_per_byte(nats, num_bytes), total, num_targets, num_bytes)
