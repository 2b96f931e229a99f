"""Where every element of the optimizer's state lies in a checkpoint, whatever layout wrote it.

An element has an address that no layout changes: canonical parameter, expert (None for what is no expert),
index in the flattened tensor of that expert or parameter. Two cuts meet in these addresses:

    this run      partition of rank 3      |-- layers.2 expert 5, 0..96 --|-- expert 6, 0..40 --| padding |
    checkpoint    rank 0, group experts    ...|-- expert 5 --|-- expert 6 --|...
                  rank 1, group experts    ...................|-- expert 7 --|...

so a partition of this run is a list of `Run`s of elements that are neighbours in both. A parameter that
several ranks saved (the two copies of a tied embedding) is read from the first. Experts are not listed one by
one: a slot says which it holds, and a manifest that claims 10^15 of them costs nothing.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_runtime.checkpoint.manifest import Manifest, PartitionEntry, Slot
from moe_runtime.errors import CheckpointError


@dataclass(frozen=True)
class Span:
    """Elements begin .. end - 1 of one canonical tensor, and where the first lies in a flat vector.

    Args:
        param: canonical name; of an expert weight the name of the stack.
        expert: global number of the expert; None for other parameters.
        shape: of the canonical tensor: of one expert, or of the parameter.
        at: place of element `begin` in the partition.
    """

    param: str
    expert: int | None
    shape: tuple[int, ...]
    begin: int
    end: int
    at: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.param if self.expert is None else f"{self.param}, expert {self.expert}"

    def whole(self) -> "Span":
        """All of the canonical tensor, from place 0."""
        return replace(self, begin=0, end=math.prod(self.shape), at=0)


@dataclass(frozen=True)
class Run:
    """Elements that lie next to each other in both cuts.

    Args:
        to: place of the first in this run's partition.
        source: the saved partition.
        at: place of the first in it.
        count: how many.
    """

    to: int
    source: PartitionEntry
    at: int
    count: int


def spans_of(slots: Sequence[Slot], start: int, end: int) -> Iterator[Span]:
    """What elements start .. end - 1 of a flat group are, in order; padding is left out.

    Args:
        slots: layout of the whole flat group.
    """
    for slot in slots:
        numel = math.prod(slot.shape)
        low, high = max(slot.offset, start), min(slot.offset + numel, end)
        if low >= high:
            continue
        shape = slot.shape if slot.first_expert is None else slot.shape[1:]
        each = math.prod(shape)
        while low < high:
            nth, begin = divmod(low - slot.offset, each)
            count = min(each - begin, high - low)
            expert = None if slot.first_expert is None else slot.first_expert + nth
            yield Span(slot.param, expert, shape, begin, begin + count, low - start)
            low += count


class FlatIndex:
    """Finds elements of optimizer state by their addresses.

    Args:
        manifest: of the checkpoint.
        where: the checkpoint's folder, for messages.
    """

    def __init__(self, manifest: Manifest, where: Path) -> None:
        self._where = where
        self._parts: dict[str, list[tuple[Slot, PartitionEntry]]] = defaultdict(list)
        for part in manifest.partitions:
            for slot in manifest.layouts[part.layout]:
                if slot.offset < part.end and part.start < slot.offset + math.prod(slot.shape):
                    self._parts[slot.param].append((slot, part))

    def runs(self, span: Span) -> Iterator[Run]:
        """The saved elements of a span, in order.

        Raises:
            CheckpointError: some are in no partition, or the parameter has another shape there.
        """
        found = sorted(self._overlaps(span), key=lambda each: each[0])
        position = span.begin
        for begin, end, at, part in found:
            if begin > position:
                break
            if end > position:
                yield Run(span.at + position - span.begin, part, at + position - begin, end - position)
                position = end
        if position < span.end:
            raise CheckpointError(
                f"{self._where}: optimizer state of {span.name}: expected elements {span.begin} to "
                f"{span.end}, got none from {position} on"
            )

    def _overlaps(self, span: Span) -> Iterator[tuple[int, int, int, PartitionEntry]]:
        """(begin, end, place of begin in the partition, partition) of what a partition has of a span."""
        for slot, part in self._parts.get(span.param, ()):
            offset, shape = slot.offset, slot.shape
            if (slot.first_expert is None) != (span.expert is None):
                continue
            if slot.first_expert is not None and span.expert is not None:
                shape = slot.shape[1:]
                nth = span.expert - slot.first_expert
                if not 0 <= nth < slot.shape[0]:
                    continue
                offset += nth * math.prod(shape)
            if shape != span.shape:
                raise CheckpointError(
                    f"{self._where}: optimizer state of {span.name}: expected shape {list(span.shape)}, "
                    f"got {list(shape)}"
                )
            begin = max(span.begin, part.start - offset)
            end = min(span.end, part.end - offset)
            if begin < end:
                yield begin, end, offset + begin - part.start, part
