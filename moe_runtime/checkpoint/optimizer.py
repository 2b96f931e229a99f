"""Optimizer partitions on their way into a checkpoint, and one rank's as they were saved.

Each rank owns one range of every flat group: the FP32 master weights and the optimizer's moments, in
whatever form the optimizer stores them (FP32, BF16, or FP8 codes with their scales). They are written
as they are, so that a run that resumes on the same layout goes on exactly. The manifest keeps which
parameter lies where in each flat group, so that a reader with another layout finds every element
(`reshard.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.manifest import PartitionEntry, Slot
from moe_runtime.checkpoint.stored_moments import MASTER
from moe_runtime.checkpoint.tensors import read_file
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.zero_partition import Partition

Scalar = int | float | bool


@dataclass(frozen=True)
class PartitionState:
    """What one rank owns of one flat group, ready to be written or just read.

    Args:
        group: name of the parameter group, of letters, digits, `_` and `.`.
        start, end: half-open element range of the whole flat group, padding included.
        layout: every parameter of the flat group, in order.
        tensors: `master` ([end - start]) and the optimizer's own tensors by its own names.
        scalars: numbers of the partition, such as the optimizer's step.
    """

    group: str
    start: int
    end: int
    layout: tuple[Slot, ...]
    tensors: dict[str, Tensor]
    scalars: dict[str, Scalar] = field(default_factory=dict)

    def named_tensors(self) -> dict[str, Tensor]:
        """`{group}.{key}` -> tensor, as the file names them."""
        return {f"{self.group}.{key}": tensor for key, tensor in self.tensors.items()}


def capture_partition(
    partition: Partition, moments: Mapping[str, Any], first_expert: int = 0
) -> PartitionState:
    """Gather what a partition consists of; no copies.

    Args:
        partition: from the ZeRO adapter.
        moments: the client optimizer's state of `partition.master`: tensors and numbers.
        first_expert: global number of this rank's first local expert.

    Raises:
        CheckpointError: the state holds something that is neither.
    """
    tensors, scalars = {MASTER: partition.master.detach()}, {}
    for key, value in moments.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach()
        elif isinstance(value, Scalar):
            scalars[key] = value
        else:
            raise CheckpointError(f"optimizer state {key} of {partition.group}: got {type(value).__name__}")
    layout = slots_of(partition, first_expert)
    return PartitionState(partition.group, partition.start, partition.end, layout, tensors, scalars)


def slots_of(partition: Partition, first_expert: int = 0) -> tuple[Slot, ...]:
    """The layout of a partition's flat group, as the manifest says it."""
    first = first_expert if partition.is_expert else None
    return tuple(
        Slot(param=entry.name, shape=entry.shape, offset=entry.offset, first_expert=first)
        for entry in partition.layout
    )


def read_partitions(checkpoint: Checkpoint, rank: int) -> dict[str, PartitionState]:
    """The partitions that `rank` saved, by the name of their group.

    Raises:
        CheckpointError: a file does not hold what the manifest says.
    """
    owned = [part for part in checkpoint.manifest.partitions if part.rank == rank]
    return {part.group: _read_partition(checkpoint, part) for part in owned}


def _read_partition(checkpoint: Checkpoint, part: PartitionEntry) -> PartitionState:
    prefix = f"{part.group}."
    saved = checkpoint.manifest.files[part.file].tensors
    wanted = {f"{prefix}{key}": saved[f"{prefix}{key}"] for key in part.keys}
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in read_file(checkpoint.path, part.file, wanted)
    }
    layout = checkpoint.manifest.layouts[part.layout]
    return PartitionState(part.group, part.start, part.end, layout, tensors, dict(part.scalars))
