"""Runs the forward and backward of a step again, to see whether a rank computes the same twice.

A chip that is wrong now and then spoils numbers that nobody holds twice: what a gradient should have been,
no replica knows, for each has other data. The rank itself does: everything is a function of the weights, the
tokens and nothing else, so two runs of a step must give the same gradients, bit for bit. If they do not, a
third run tells which kind of fault it is: agreeing with one of the two, the other was an accident, and the
step goes on with what two runs agree on; agreeing with none, the rank cannot be trusted at all.

What is wrong the same way each time is not seen by this; nor what goes wrong in the reduction after it.
"""

from collections.abc import Callable
from typing import TypeVar

from moe_runtime.errors import NumericsError
from moe_runtime.metrics.recorder import Tell
from moe_runtime.parallel.digest import digest
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.zero import ZeroOptimizer

T = TypeVar("T")
Digests = dict[str, int]
_SHOWN = 3


def is_replayed(every: int, step: int) -> bool:
    """True if this step, from 1, is run twice."""
    return every > 0 and step % every == 0


def replay(run: Callable[[], T], optimizer: ZeroOptimizer, peers: Peers, step: int, tell: Tell) -> T:
    """Run twice, and a third time if gradients differ; gives what the last run gave. A collective call.

    Args:
        run: forward and backward of the step, from cleared gradients.
        step: from 1.
        tell: called with the kind of an event, its step, its message and fields.

    Raises:
        NumericsError: three runs, three results, on some rank; on every rank alike.
    """
    run()
    first = gradient_digests(optimizer)
    result = run()
    second = gradient_digests(optimizer)
    odd = differing(first, second)
    if not peers.any_true(bool(odd)):
        return result
    result = run()
    third = gradient_digests(optimizer)
    # Judged tensor by tensor: an accident in one run may touch any number of them.
    is_lost = any(third[name] not in (first[name], second[name]) for name in third)
    said = [{"rank": peers.rank, "tensors": odd, "persistent": is_lost}] if odd or is_lost else []
    damages = [damage for each in peers.gather_json(said) for damage in each]
    is_persistent = any(damage["persistent"] for damage in damages)
    message = f"gradients of the same step differ when it is run again: {_describe(damages)}"
    nature = "persistent: a third run agrees with neither" if is_persistent else "transient: two runs agree"
    tell("corruption", step, f"{message}; {nature}", damages=damages, persistent=is_persistent)
    if is_persistent:
        raise NumericsError(
            f"step {step}: {message}; {nature}; take the machine of that rank out of the run, and the same "
            "command continues from the last checkpoint"
        )
    return result


def gradient_digests(optimizer: ZeroOptimizer) -> Digests:
    """A digest of every gradient that this rank holds, by parameter."""
    return {part.name: int(digest(part.flat)) for part in optimizer.gradients()}


def differing(one: Digests, other: Digests) -> list[str]:
    """Names whose digests differ."""
    return [name for name, found in one.items() if other[name] != found]


def _describe(damages: list[dict]) -> str:
    shown = [f"rank {damage['rank']}: {', '.join(damage['tensors'][:_SHOWN])}" for damage in damages[:_SHOWN]]
    more = f" and {len(damages) - _SHOWN} ranks more" if len(damages) > _SHOWN else ""
    return "; ".join(shown) + more
