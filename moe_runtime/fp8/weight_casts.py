"""FP8 forms of weights: made once, used by all microbatches of a step, dropped when the weights change.

A weight is read 2 x microbatches times between two optimizer steps, and casting it costs as much traffic as a
small product. So its blocks, and those of its transpose for Dgrad, are kept: two bytes a parameter.

Who changes weights says `drop()`: the optimizer after its step, whoever loads a checkpoint. An entry also
remembers where its weight was and at which version, and is not used for another; but that alone would not
do, for ZeRO writes weights through flat buffers whose writes a parameter's version need not show.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_runtime.fp8.cast import cast_weight_both
from moe_runtime.fp8.tiled import Blocks


@dataclass
class _Entry:
    weight: Tensor
    both: tuple[Blocks, Blocks]
    place: tuple[int, int]  # address and version of the weight


class WeightCasts:
    """Blocks of weights, by weight.

    Args:
        cast: makes the blocks of a weight [..., out, in], and of its transposed; may be replaced.
    """

    def __init__(self, cast: Callable[[Tensor], tuple[Blocks, Blocks]] = cast_weight_both) -> None:
        self.cast = cast
        self._entries: dict[int, _Entry] = {}

    def blocks(self, weight: Tensor) -> Blocks:
        """Blocks of weight [..., out, in]: right operand of Fprop."""
        return self._entry(weight).both[0]

    def transposed(self, weight: Tensor) -> Blocks:
        """Blocks [..., in, out] of the transposed weight: right operand of Dgrad."""
        return self._entry(weight).both[1]

    def drop(self) -> None:
        """Forget all: the weights have changed, or are about to."""
        self._entries.clear()

    def held(self) -> list[tuple[Tensor, Blocks]]:
        """Every weight that is held now, with its blocks."""
        return [(entry.weight, entry.both[0]) for entry in self._entries.values()]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """What is held now."""
        held = [blocks for entry in self._entries.values() for blocks in entry.both]
        return [tensor for blocks in held for tensor in (blocks.codes, blocks.scales)]

    def _entry(self, weight: Tensor) -> _Entry:
        place = (weight.data_ptr(), weight._version)
        entry = self._entries.get(id(weight))
        if entry is None or entry.weight is not weight or entry.place != place:
            entry = self._entries[id(weight)] = _Entry(weight, self.cast(weight.detach()), place)
        return entry
