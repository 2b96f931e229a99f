"""How far a loss stands out from those before it.

A robust z-score: the distance from their median, in units of their spread, which is 1.4826 times the median
distance from the median (the standard deviation, of normal numbers). Mean and deviation were rejected: one
spike in the window would hide the next. It is a function of recorded losses alone, so a run that resumes, or
that is rolled back, judges as the first one did.

The spread is taken as at least a thousandth of the median: losses of a run that has stopped learning are all
but equal, and would make a spike of any noise.
"""

import math
from collections.abc import Sequence
from statistics import median

_NORMAL = 1.4826
_LEAST_SPREAD = 1e-3


def robust_z(losses: Sequence[float], loss: float) -> float:
    """z of `loss` against earlier ones; positive above their median. NaN of no losses."""
    if not losses:
        return math.nan
    middle = median(losses)
    spread = _NORMAL * median(abs(other - middle) for other in losses)
    return (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
