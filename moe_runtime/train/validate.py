"""Validation loss in the layout of the run: forwards only, the same sequences each time."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_runtime.data.bits import ByteCounter, bits_per_byte
from moe_runtime.data.loader import BatchLoader
from moe_runtime.errors import DataError
from moe_runtime.model.phase import LOSS
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.schedule.forward_only import forward_only
from moe_runtime.train.step import split_microbatches


@dataclass(frozen=True)
class Validation:
    """Mean over the validation sequences.

    Args:
        loss: nats per token.
        bits_per_byte: bits per byte of the text that these tokens stand for.
        sequences: how many were used.
    """

    loss: float
    bits_per_byte: float
    sequences: int


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
    # The loss comes from the last stage only; every row of the pipeline read the same bytes.
    own = [scalars.totals.get(LOSS, 0.0) * size, counter.bytes_of(targets) / mesh.pp]
    sums = torch.tensor(own, dtype=torch.float64)
    if mesh.world_size > 1:
        dist.all_reduce(sums, group=runtime.groups.control)
    loss, num_bytes = float(sums[0]) / total, round(float(sums[1]))
    nats = loss * total * runtime.config.batch.seq_len
    return Validation(loss, bits_per_byte(nats, num_bytes), total)
