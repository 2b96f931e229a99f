"""Random faults from a seed: what, on which rank, where in a step.

Two classes. After the first the run goes on to the very bits of a clean one: processes die, stop, hang,
raise, or are asked to leave. The second changes what is computed by design (a step whose gradient is not
finite is skipped), and the clean run is given the same decisions.
"""

import random
from collections.abc import Sequence

from moe_runtime.errors import ConfigError

PREEMPT = "preempt"  # SIGTERM to the launcher, and the same command again
HANGS = ("sigstop", "gil", "sleep")
EXACT = ("sigkill", *HANGS, "raise", "exit", "segfault", "diskfull", PREEMPT)
CHANGING = ("nan", "inf")
_PHASES = ("data", "forward", "backward", "optimizer")
_IN_SAVES = ("save_write", "save_rename")
_IN_LAYERS = ("dispatch", "combine")


def kinds_of(text: str) -> tuple[str, ...]:
    """The kinds that a user names: a list with commas, `exact`, or `all`.

    Raises:
        ConfigError: one is unknown.
    """
    groups = {"exact": EXACT, "all": (*EXACT, *CHANGING)}
    kinds = groups.get(text) or tuple(text.split(","))
    unknown = [kind for kind in kinds if kind not in groups["all"]]
    if unknown:
        raise ConfigError(
            f"--kinds: expected exact, all, or some of {','.join(groups['all'])}, got {unknown[0]!r}"
        )
    return kinds


class Draw:
    """A sequence of faults.

    Args:
        seed: the same one gives the same sequence of kinds, ranks, phases and pauses.
        ranks: of the run.
        has_exchanges: the run has MoE layers, so that dispatch and combine occur.
    """

    def __init__(self, seed: int, ranks: int, kinds: Sequence[str], has_exchanges: bool) -> None:
        self._random = random.Random(seed)
        self._ranks, self._kinds = ranks, list(kinds)
        self._phases = (*_PHASES, *(_IN_LAYERS if has_exchanges else ()))

    def pause(self, mean_s: float) -> float:
        """Seconds until the next fault, as of a Poisson process, at most three times the mean."""
        return min(self._random.expovariate(1.0 / mean_s), 3.0 * mean_s)

    def fault(self, step: int) -> str:
        """A fault of that step, as `train --inject` reads it; or the word preempt."""
        kind, rank = self._random.choice(self._kinds), self._random.randrange(self._ranks)
        if kind == PREEMPT:
            return PREEMPT
        head = f"{kind}:rank{rank}:step{step}"
        if kind in CHANGING:
            return f"{head}:grad"
        if kind == "diskfull":
            return f"{head}:save_write"
        deadly = kind in ("sigkill", "segfault", "exit")
        return f"{head}:{self._random.choice((*self._phases, *(_IN_SAVES if deadly else ())))}"
