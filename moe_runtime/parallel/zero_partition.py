"""What one rank owns of a flat parameter group: the seam between ZeRO and checkpoints.

The parameters of a group lie end to end in one flat vector, padded to twice the number of owners and
cut into equal partitions. A parameter may straddle owners, and a partition may hold only padding.

    flat     |--- a ---|- b -|------- c -------|pad|
    owners   |     rank 0    |     rank 1          |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class FlatEntry:
    """Where a parameter lies in its flat group; `offset` and `numel` in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank owns.

    Args:
        name: the parameter.
        begin, end: range of the flattened parameter.
        local: where the range begins within the partition.
    """

    name: str
    begin: int
    end: int
    local: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Partition:
    """One rank's share of one flat group.

    Args:
        group: name of the parameter group.
        is_expert: the group's owners are the expert-data-parallel group.
        layout: every parameter of the group, in flat order.
        start, end: this rank's range of the flat group; may reach into the padding.
        owner_rank, num_owners: which of the equal partitions this is.
        master: FP32 [end - start], live: writing to it changes the training state. It is also the
            client optimizer's parameter, the key of its state.
    """

    group: str
    is_expert: bool
    layout: tuple[FlatEntry, ...]
    start: int
    end: int
    owner_rank: int
    num_owners: int
    master: Tensor

    def pieces(self) -> Iterator[Piece]:
        """The owned part of each parameter that this partition touches, in flat order."""
        for entry in self.layout:
            begin = max(entry.offset, self.start)
            end = min(entry.offset + entry.numel, self.end)
            if begin < end:
                yield Piece(entry.name, begin - entry.offset, end - entry.offset, begin - self.start)


def lay_out(params: Sequence[Parameter], names: dict[Parameter, str]) -> tuple[FlatEntry, ...]:
    """End-to-end layout of a group's parameters, in order."""
    entries: list[FlatEntry] = []
    offset = 0
    for param in params:
        entries.append(FlatEntry(names[param], tuple(param.shape), offset, param.numel()))
        offset += param.numel()
    return tuple(entries)
