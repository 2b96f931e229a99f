"""What casts to FP8 do to a run's values, counted in a sample: range, what is lost below, what is cut above.

    class       values before the cast                             seen where
    input       what linears, SwiGLU and experts multiply          forward
    gradient    what comes back to them                            backward
    weight      the weights themselves, in blocks                  between backward and update

A tile's scale follows its own largest value, so a sound cast cuts nothing: about one element in a thousand
has the largest code, the one that made the scale. Many of them say that scales are too small. What is lost
are values 2^17 and more below the largest of their tile, and many of those say that tiles are too uneven.

Beside the casts one product is probed: rows of a linear's output as FP8 computed it, against the same rows
multiplied in the weights' own precision. Two operands with a rounding error of 2^-4 at most each make about
4%, whatever the width.

Looked at are the first 128 rows of a matrix, and only in sampled steps; nobody waits for a device meanwhile.
Rows that arrive over the wire as tiles have no values any more; they were seen where they were cast.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Tiles, num_tiles
from moe_runtime.fp8.weight_casts import WeightCasts

CLASSES = ("input", "weight", "gradient")
ROWS = 128
COUNTS = ("elements", "underflows", "saturated")
TOPS = ("amax", "scale_max", "scale_min")  # the last one negated, so that the largest is wanted of each
_MAGNITUDE, _LARGEST_CODE = 0x7F, 0x7E


@dataclass
class OperandCounts:
    """Of one class: float64 counts [3] in the order of COUNTS and tops [3] in that of TOPS, on the device."""

    counts: Tensor
    tops: Tensor

    @classmethod
    def blank(cls, device: torch.device) -> "OperandCounts":
        tops = torch.full((len(TOPS),), -torch.inf, dtype=torch.float64, device=device)
        return cls(torch.zeros(len(COUNTS), dtype=torch.float64, device=device), tops)

    def add(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Count a matrix.

        Args:
            values: [..., rows, columns] before the cast.
            codes: uint8, of the same shape.
            scales: float32 [..., rows or rows / 128, tiles], of the codes.
        """
        if not codes.numel():
            return
        magnitudes = codes & _MAGNITUDE
        lost, cut = (magnitudes == 0) & (values != 0), magnitudes == _LARGEST_CODE
        self.counts[0] += codes.numel()
        self.counts[1] += lost.sum()
        self.counts[2] += cut.sum()
        is_used = _per_scale(magnitudes, scales) > 0  # a tile of zeros has the scale of the floor
        low = torch.tensor(-torch.inf, device=scales.device)
        found = (
            values.abs().amax(),
            scales.where(is_used, low).amax(),
            (-scales).where(is_used, low).amax(),
        )
        self.tops = torch.maximum(self.tops, torch.stack([top.double() for top in found]))


@dataclass
class Fp8Watch:
    """Counts of a rank's sampled step.

    Attributes:
        is_on: this step is sampled. Who casts asks first, for the values may have to be made.
    """

    is_on: bool = False
    seconds: float = 0.0  # host time that looking has taken since `take_seconds`
    classes: dict[str, OperandCounts] = field(default_factory=dict)
    error: Tensor | None = None  # float64 [2]: squares of the error, and of what is right

    def begin(self, is_on: bool) -> None:
        """Forget what was counted."""
        self.is_on, self.error = is_on, None
        self.classes.clear()

    def saw(self, kind: str, values: Tensor, tiles: Tiles) -> None:
        """A cast of `values` [..., columns] was made."""
        begun = time.perf_counter()
        rows = values.detach().reshape(-1, values.shape[-1])[:ROWS]
        self._of(kind, rows.device).add(rows, tiles.codes[:ROWS], tiles.scales[:ROWS])
        self.seconds += time.perf_counter() - begun

    def saw_weights(self, casts: WeightCasts) -> None:
        """The weights that were cast for this step."""
        for weight, blocks in casts.held():
            rows = weight.detach()[..., :ROWS, :]
            self._of("weight", rows.device).add(rows, blocks.codes[..., :ROWS, :], blocks.scales[..., :1, :])

    def saw_product(self, exact: Tensor, product: Tensor) -> None:
        """Rows of a product, in high precision and as FP8 computed them."""
        begun = time.perf_counter()
        right = exact.double()
        squares = torch.stack(((product.double() - right).square().sum(), right.square().sum()))
        self.error = squares if self.error is None else self.error + squares
        self.seconds += time.perf_counter() - begun

    def take_seconds(self) -> float:
        """Host time that looking took since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _of(self, kind: str, device: torch.device) -> OperandCounts:
        if kind not in self.classes:
            self.classes[kind] = OperandCounts.blank(device)
        return self.classes[kind]


def _per_scale(magnitudes: Tensor, scales: Tensor) -> Tensor:
    """The largest of the codes under each scale, in the shape of the scales."""
    columns = magnitudes.shape[-1]
    padded = torch.nn.functional.pad(magnitudes, (0, num_tiles(columns) * TILE - columns))
    per_row = padded.unflatten(-1, (-1, TILE)).amax(-1)
    return per_row if per_row.shape == scales.shape else per_row.amax(-2, keepdim=True)
