"""Skipped steps: which gradient was not finite, and the end of a run that skips too many in a row.

One bad gradient in a million steps is a bad microbatch or a bit; five in a row are a run that has diverged
and will not come back by itself.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from moe_runtime.errors import DataError, NumericsError
from moe_runtime.parallel.nonfinite import Culprit
from moe_runtime.parallel.runtime import Runtime

_SHOWN = 3  # parameters in a message; the event has all
Blame = dict[str, Any]


def gather_blame(culprits: Iterable[Culprit], runtime: Runtime, bad_data: str | None = None) -> list[Blame]:
    """Why no rank could use the gradients of a step; a collective call.

    Args:
        culprits: of this rank.
        bad_data: what this rank read that the model cannot take; its gradients say nothing then.

    Returns:
        Either `rank` and `data`, what was read, or the fields of `Culprit` and `rank`, null where only the
        sum over ranks is known, and `expert`, the global number of the first one hit, or null.
    """
    params = dict(runtime.named_params)
    rank = None if runtime.config.layout.zero_stage == 2 else runtime.mesh.rank  # it holds sums over ranks
    local = runtime.config.model.num_experts // runtime.mesh.ep
    own: list[Blame] = [] if bad_data is None else [{"rank": runtime.mesh.rank, "data": bad_data}]
    for culprit in culprits if bad_data is None else ():
        expert = None
        if getattr(params[culprit.name], "is_expert", False):
            per_expert = params[culprit.name].numel() // local
            expert = runtime.mesh.ep_rank * local + culprit.first // per_expert
        own.append({"rank": rank, "expert": expert, **asdict(culprit)})
    return [blame for said in runtime.peers.gather_json(own) for blame in said]


def describe(blames: list[Blame]) -> str:
    """One line of what is not finite and where."""
    if not blames:
        return "every rank's own gradients are finite, their sum or its norm is not"
    shown = [_describe_one(blame) for blame in blames[:_SHOWN]]
    more = f" and {len(blames) - _SHOWN} more" if len(blames) > _SHOWN else ""
    return "; ".join(shown) + more


def _describe_one(blame: Blame) -> str:
    if "data" in blame:
        return f"rank {blame['rank']}: {blame['data']}"
    expert = "" if blame["expert"] is None else f" (expert {blame['expert']})"
    counts = {"NaN": blame["nans"], "infinite": blame["infs"]}
    what = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    where = "summed over ranks" if blame["rank"] is None else f"on rank {blame['rank']}"
    return f"{blame['name']}{expert} {where}: {what} of {blame['numel']}"


def check_data(blames: list[Blame], action: str) -> None:
    """End a run that read what its model cannot take, unless `data.bad` says to go on.

    Raises:
        DataError: on every rank alike.
    """
    bad = [blame for blame in blames if "data" in blame]
    if bad and action == "stop":
        raise DataError(f"{_describe_one(bad[0])}; or leave such steps out with data.bad=skip")


def check_row(skips_in_row: int, limit: int, what: str) -> None:
    """End a run that skips step after step.

    Raises:
        NumericsError: `limit` steps in a row; on every rank alike.
    """
    if skips_in_row >= limit:
        raise NumericsError(
            f"guard.max_skips: {limit} steps in a row were skipped, the last for {what}; resume from the "
            "last checkpoint with a lower optim.peak_lr, or with data.skip over the bad data"
        )
