"""How long a list of phases takes when its exchanges fly beside its computation.

One rank, two lanes. The computation lane walks the list in order. An exchange starts when that lane has come
to it and the exchange before it has landed; what needs its rows waits for it. This is what a GPU with two
streams does with the list that the executor runs.

    combine(B) attend(F)  experts(B) ... experts(F)  attend(B)
    ========== ---------- ---------- ... ----------  ----------     computation
      flies ------------> awaited                                   exchange

While an exchange flies it holds multiprocessors, so each step has two times. In an overlapped pair they are
held all along (the kernels of a pair are launched for the rest); in a list of one pass alone only what stands
between an exchange and the one that waits for it is slowed. Ref: DSV3 §3.2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TimedStep:
    """A phase with its time.

    Args:
        label, layer: as the executor's steps have them; `_b` backward, `_w` weight gradients.
        alone: seconds of it with nothing beside it.
        beside: seconds of a computation beside an exchange.
        is_exchange: it flies; else it computes.
    """

    label: str
    layer: str
    alone: float
    beside: float
    is_exchange: bool = False


@dataclass(frozen=True)
class Flown:
    """What a list of steps comes to, in seconds.

    Args:
        span: from its start to its end; span - computing: what stood still for exchanges.
        computing: its computation, slowed where it was.
        flying: the times of all exchanges together.
    """

    span: float
    computing: float
    flying: float


# Whose rows a step waits for, by label. What adds the routed output to the stream waits for combine.
_AWAITED = {
    "experts": "dispatch",
    "attend": "combine",
    "dense": "combine",
    "merge": "combine",
    "experts_b": "combine_b",
    "attend_b": "dispatch_b",
}


def fly(steps: Sequence[TimedStep], held: bool) -> Flown:
    """Walk both lanes.

    Args:
        steps: in the order in which a rank runs them.
        held: exchanges hold their multiprocessors all along.
    """
    now = lane = computing = flying = 0.0
    landing: dict[str, float] = {}
    for step in steps:
        if step.is_exchange:
            lane = max(now, lane) + step.alone
            landing[step.label] = lane
            flying += step.alone
            continue
        now = max(now, landing.pop(_AWAITED.get(step.label, ""), 0.0))
        time = step.beside if held or lane > now else step.alone
        now += time
        computing += time
    return Flown(max(now, lane), computing, flying)
