"""How two checkpoints of any layouts differ, tensor by tensor.

Weights and their averages have canonical names; optimizer state is found by the addresses of its elements, so
a checkpoint of 16 ranks can be held against one of a single process. One tensor of each is in memory at a
time. Moments are compared as numbers: codes of FP8 that decode to the same values are alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.checkpoint.flat_index import FlatIndex, Span, spans_of
from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.stored_moments import MASTER, NONE, masters_of, moments_of, stored_form
from moe_runtime.checkpoint.weights import name_of_expert
from moe_runtime.optim.moments import MEAN, SQUARE

KINDS = ("weights", "ema", MASTER, MEAN, SQUARE)
_Address = tuple[str, str]  # kind, canonical name


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that two checkpoints do not agree about.

    Args:
        kind: one of `KINDS`.
        name: canonical, one for each expert.
        said: what is different, in words.
        largest: the largest difference of an element; infinite where they cannot be compared.
    """

    kind: str
    name: str
    said: str
    largest: float


@dataclass(frozen=True)
class Difference:
    """What a comparison found.

    Args:
        alike: how many tensors of each kind are the same in every element.
        differing: the others, the largest difference first.
    """

    alike: dict[str, int]
    differing: tuple[TensorDifference, ...]


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> Difference:
    """Hold every tensor of one checkpoint against that of the other.

    Args:
        first, second: verified checkpoints.

    Raises:
        CheckpointError: a file does not hold what its manifest says, or optimizer state is not whole.
    """
    with SliceReader(first) as reader, SliceReader(second) as other_reader:
        ours, theirs = _Contents(reader), _Contents(other_reader)
        alike = dict.fromkeys(KINDS, 0)
        differing = []
        for address in dict.fromkeys([*ours.addresses, *theirs.addresses]):
            found = _difference(address, ours, theirs)
            if found is None:
                alike[address[0]] += 1
            else:
                differing.append(found)
    differing.sort(key=lambda each: -each.largest)
    return Difference(alike, tuple(differing))


class _Contents:
    """The tensors of one checkpoint by kind and canonical name, none of them read yet."""

    def __init__(self, reader: SliceReader) -> None:
        self.reader = reader
        checkpoint = reader.checkpoint
        self._files = {
            (kind, name): file
            for kind in ("weights", "ema")
            for name, file, _ in checkpoint.manifest.weights(kind)
        }
        self._index = FlatIndex(checkpoint.manifest, checkpoint.path)
        self._spans = {_canonical(span): span for span in _whole_spans(checkpoint)}
        forms = {stored_form(checkpoint.manifest, part) for part in checkpoint.manifest.partitions}
        kinds = (MASTER,) if NONE in forms else (MASTER, MEAN, SQUARE)
        self.addresses: dict[_Address, None] = dict.fromkeys(
            [*self._files, *((kind, name) for name in self._spans for kind in kinds)]
        )

    def read(self, address: _Address) -> Tensor:
        """A tensor; of optimizer state flattened, FP32."""
        kind, name = address
        if address in self._files:
            return self.reader.whole(self._files[address], name)
        parts = []
        for run in self._index.runs(self._spans[name]):
            if kind == MASTER:
                parts.append(masters_of(self.reader, run.source, run.at, run.count))
            else:
                mean, square = moments_of(self.reader, run.source, run.at, run.count)
                parts.append(mean if kind == MEAN else square)
        return torch.cat(parts)


def _whole_spans(checkpoint: Checkpoint) -> Iterator[Span]:
    """Every parameter or expert that partitions touch, as a whole; some of them several times."""
    manifest = checkpoint.manifest
    for part in manifest.partitions:
        for span in spans_of(manifest.layouts[part.layout], part.start, part.end):
            yield span.whole()


def _canonical(span: Span) -> str:
    return span.param if span.expert is None else name_of_expert(span.param, span.expert)


def _difference(address: _Address, ours: _Contents, theirs: _Contents) -> TensorDifference | None:
    """What is different about one tensor; None if nothing is."""
    kind, name = address
    for contents, where in ((ours, "second"), (theirs, "first")):
        if address not in contents.addresses:
            return TensorDifference(kind, name, f"only in the {where}", torch.inf)
    first, second = ours.read(address), theirs.read(address)
    if first.shape != second.shape:
        return TensorDifference(kind, name, f"shapes {list(first.shape)} and {list(second.shape)}", torch.inf)
    said, largest = _unlike_elements(first, second)
    if first.dtype != second.dtype:
        types = " and ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (first, second))
        said = f"{types}; {said or 'the same values'}"
    return TensorDifference(kind, name, said, largest) if said else None


def _unlike_elements(first: Tensor, second: Tensor) -> tuple[str, float]:
    """(how many elements differ and by how much, the largest difference); NaN is like NaN."""
    one, other = (tensor.reshape(-1).to(torch.float64) for tensor in (first, second))
    unlike = one.ne(other) & ~(one.isnan() & other.isnan())
    count = int(unlike.sum())
    if count == 0:
        return "", 0.0
    largest = float((one - other)[unlike].abs().nan_to_num(nan=torch.inf).max())
    scale = float(torch.cat([one, other]).abs().nan_to_num(nan=0.0).max())
    share = f", {largest / scale:.2g} of the largest" if 0 < scale < torch.inf and largest < torch.inf else ""
    return f"{count:,} of {one.numel():,} elements, by up to {largest:.3g}{share}", largest


def count_by_kind(found: Iterable[TensorDifference]) -> dict[str, int]:
    """How many differing tensors there are of each kind."""
    counts = dict.fromkeys(KINDS, 0)
    for each in found:
        counts[each.kind] += 1
    return counts
