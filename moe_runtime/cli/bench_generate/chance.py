"""How often a draft that knows nothing is accepted: the control of an acceptance rate.

A draft d taken from a histogram h, whatever the context, stands with probability p(d). Then it is the token
that comes out; refused, it is not. So it stands exactly if it equals the token o that comes out at its place,
and o does not depend on it, for rejection keeps the target's distribution. Given the tokens that came out,
the number of drafts that stand is a sum of independent coins of probability h(o), hence

    rate = sum over v of h(v) g(v)       g: histogram of the tokens that came out where drafts were tried
    standard error = sqrt(sum over v of g(v) h(v) (1 - h(v)) / trials)

A decoder that accepts more or less than this for such drafts verifies wrongly.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chance:
    """What drafts without knowledge should reach.

    Args:
        rate: expected share that stands.
        standard_error: of the share over the trials.
    """

    rate: float
    standard_error: float

    def deviation(self, measured: float) -> float:
        """How many standard errors `measured` is off; 0 if it is exactly right."""
        off = measured - self.rate
        return (
            off / self.standard_error if self.standard_error else math.copysign(math.inf, off) if off else 0.0
        )


def chance_of(drafts: Iterable[int], outputs: Sequence[int]) -> Chance:
    """The chance rate of drafts drawn from the histogram of `drafts`, where `outputs` came out.

    Args:
        drafts: the pool, at least one.
        outputs: the token that came out at the place of each trial, at least one.
    """
    pool = Counter(drafts)
    size, trials = pool.total(), len(outputs)
    shares = [(count / trials, pool[token] / size) for token, count in Counter(outputs).items()]
    rate = sum(g * h for g, h in shares)
    variance = sum(g * h * (1 - h) for g, h in shares) / trials
    return Chance(rate, math.sqrt(variance))
