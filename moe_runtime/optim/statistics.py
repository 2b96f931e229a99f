"""What a step with FP8 moments did to its numbers, counted while they were in registers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepStatistics:
    """Counts over the elements of one step, or of several added together.

    Args:
        elements: stepped, padding of the last block excluded.
        zeros: codes of sqrt(v) that are zero.
        underflows: of these, those whose exact v was above zero.
        saturated: codes of m / sqrt(v) at the largest magnitude of E4M3 (28 after its scale).
        stalled: sqrt(v) reads as before the step although its exact value changed. Stochastic rounding
            leaves most small decays in place and makes up for it in a few elements; a share near 1 over
            many steps is what shows a frozen average.
        nonfinite: elements whose v is stored as NaN.
        min_scale: smallest exponent of a block's scale, over blocks with a code that is not zero.
        max_scale: largest such exponent; both None if there is no such block.
        largest_update: largest |m^| / (sqrt(v^) + eps), in learning rates, decay excluded; NaN if one is.
    """

    elements: int = 0
    zeros: int = 0
    underflows: int = 0
    saturated: int = 0
    stalled: int = 0
    nonfinite: int = 0
    min_scale: int | None = None
    max_scale: int | None = None
    largest_update: float = 0.0

    def __add__(self, other: "StepStatistics") -> "StepStatistics":
        """Both together: counts added, extremes of the two."""
        lows = [scale for scale in (self.min_scale, other.min_scale) if scale is not None]
        highs = [scale for scale in (self.max_scale, other.max_scale) if scale is not None]
        updates = (self.largest_update, other.largest_update)
        return StepStatistics(
            elements=self.elements + other.elements,
            zeros=self.zeros + other.zeros,
            underflows=self.underflows + other.underflows,
            saturated=self.saturated + other.saturated,
            stalled=self.stalled + other.stalled,
            nonfinite=self.nonfinite + other.nonfinite,
            min_scale=min(lows, default=None),
            max_scale=max(highs, default=None),
            # max() of Python drops a NaN by position
            largest_update=next((u for u in updates if u != u), max(updates)),
        )
