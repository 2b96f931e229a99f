"""The rate of links at which exchanges of tokens take as long as computation: the report's 1:1.

Found with overlap off, under the same shares of the processor. Computation is what is left of a step
without its waits, on links without a limit. An exchange takes time there too: its rows are packed and
copied, and a rank may come late to it. What links add to that is bytes over rate; so the rate follows,
is tried, and is corrected by what was measured.
Ref: DSV3 §3.2.1.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = list[dict[str, Any]]  # what each rank said of it

_CLOSE_ENOUGH = 0.05
_TRIES = 4
# Where exchanges take most of the time without any limit, links still get this part of the computation's.
_LEAST_PART = 0.25


@dataclass(frozen=True)
class OneToOne:
    """The rate found, and what it rests on: seconds of a step, mean over ranks.

    Args:
        rate_mbit: of links, in 10^6 bit/s.
        contender: it was found with.
        compute_s: a rank computed.
        exchange_s: exchanges were under way.
        link_s: bytes over rate, the part of that which links add at least.
    """

    rate_mbit: int
    contender: str
    compute_s: float
    exchange_s: float
    link_s: float

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
    compute_s, beside_s = _mean(free, _computed), _mean(free, lambda rank: rank["exchange_s"])
    megabits = _mean(free, lambda rank: rank["exchange_bytes"]) * 8e-6
    found: OneToOne | None = None
    for _ in range(_TRIES):
        link_s = max(compute_s - beside_s, _LEAST_PART * compute_s)
        rate = max(1, round(megabits / link_s))
        limit(rate)
        exchange_s = _mean(run(contender), lambda rank: rank["exchange_s"])
        found = OneToOne(rate, contender, compute_s, exchange_s, megabits / rate)
        if abs(found.ratio - 1) <= _CLOSE_ENOUGH:
            break
        beside_s = exchange_s - found.link_s
    assert found is not None
    return found


def _computed(rank: dict[str, Any]) -> float:
    return float(rank["end"] - rank["begin"] - rank["exchange_wait_s"] - rank["transfer_wait_s"])


def _mean(step: Step, of: Callable[[dict[str, Any]], float]) -> float:
    return statistics.mean(map(of, step))
