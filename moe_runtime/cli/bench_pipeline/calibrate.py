"""The rate of links at which exchanges of tokens take as long as computation: the report's 1:1.

Measured with overlap off and under the same shares of the processor: how long a rank computes in a step
is what is left of it without its waits, on links without a limit; how long it exchanges is its wait on
limited ones. Bytes over computation is the first guess; then the rate follows the ratio measured.
Ref: DSV3 §3.2.1.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = list[dict[str, Any]]  # what each rank said of it

_CLOSE_ENOUGH = 0.1
_TRIES = 4


@dataclass(frozen=True)
class OneToOne:
    """The rate found, and what it rests on.

    Args:
        rate_mbit: of links, in 10^6 bit/s.
        contender: it was found with.
        compute_s: of a rank in a step, mean over ranks.
        exchange_s: that a rank waited for exchanges at that rate, mean over ranks.
    """

    rate_mbit: int
    contender: str
    compute_s: float
    exchange_s: float

    @property
    def ratio(self) -> float:
        """Exchange over computation."""
        return self.exchange_s / self.compute_s


def calibrate(contender: str, run: Callable[[str], Step], limit: Callable[[int | None], None]) -> OneToOne:
    """Find the rate; leaves links at it.

    Args:
        contender: of ours, without overlap.
        run: runs one of its steps.
        limit: sets the rate of links; None takes limits away.
    """
    limit(None)
    run(contender)
    free = run(contender)
    compute_s = _mean(free, _computed)
    rate = _mean(free, lambda rank: rank["exchange_bytes"]) * 8e-6 / compute_s
    for _ in range(_TRIES):
        found = _at(max(1, round(rate)), contender, compute_s, run, limit)
        if abs(found.ratio - 1) <= _CLOSE_ENOUGH:
            break
        rate = found.rate_mbit * found.ratio
    return found


def _at(
    rate_mbit: int,
    contender: str,
    compute_s: float,
    run: Callable[[str], Step],
    limit: Callable[[int | None], None],
) -> OneToOne:
    limit(rate_mbit)
    return OneToOne(
        rate_mbit, contender, compute_s, _mean(run(contender), lambda rank: rank["exchange_wait_s"])
    )


def _computed(rank: dict[str, Any]) -> float:
    return float(rank["end"] - rank["begin"] - rank["exchange_wait_s"] - rank["transfer_wait_s"])


def _mean(step: Step, of: Callable[[dict[str, Any]], float]) -> float:
    return statistics.mean(map(of, step))
