"""What FP8 moments went through in a step, over all ranks, and whether it is more than a run may bear.

An optimizer state that goes wrong shows in the loss when it is too late to mend: second moments that
underflow, averages that freeze, one NaN that spreads over its block. The counts are taken while the step
has the numbers at hand, every `optim.numerics.every` steps, added up over all ranks in two small
reductions, and stand in metrics.jsonl by parameter group. A limit is a share of a group's elements, so it
says the same of every size of model and every layout.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.config.schema import NumericsConfig, NumericsLimits
from moe_runtime.errors import NumericsError
from moe_runtime.optim.groups import GROUP_NAMES
from moe_runtime.optim.statistics import StepStatistics

SHARES = ("zeros", "underflows", "saturated", "stalled", "nonfinite")
# What may be behind a breach, and what to do about it.
_REMEDIES = {
    "zeros": "many parameters never get a gradient: look at the loads of experts",
    "underflows": "gradients within a block of 128 differ by more than 1 : 10^7; set optim.moments to bf16",
    "saturated": "|m| exceeds 28 sqrt(v); lower betas[0] or raise betas[1], or set optim.moments to bf16",
    "stalled": "v no longer follows the gradients; set optim.moments to bf16 or fp32",
    "nonfinite": "a gradient was not finite; resume from the last checkpoint with a lower optim.peak_lr",
    "largest_update": "lower optim.peak_lr or raise optim.eps; or set optim.moments to bf16",
}

Report = dict[str, dict[str, float | int | None]]


def is_due(config: NumericsConfig, moments: str, step: int) -> bool:
    """True if the step after `step` steps is to be counted."""
    return moments == "fp8" and config.every > 0 and (step + 1) % config.every == 0


def reduce_statistics(
    own: Mapping[int, StepStatistics], group: dist.ProcessGroup | None, world_size: int
) -> Report:
    """One report for all ranks; a collective call.

    Args:
        own: this rank's, by `group_id`; groups that it does not hold are left out.
        group: over CPU tensors.

    Returns:
        Group name -> `metrics.record.NUMERICS_KEYS`; groups that nobody stepped are left out.
    """
    sums = torch.zeros(len(GROUP_NAMES), 1 + len(SHARES), dtype=torch.float64)
    tops = torch.full((len(GROUP_NAMES), 4), -torch.inf, dtype=torch.float64)
    for group_id, found in own.items():
        counts = [getattr(found, name) for name in ("elements", *SHARES)]
        sums[group_id] = torch.tensor(counts, dtype=torch.float64)
        is_nan = found.largest_update != found.largest_update
        largest = [
            -torch.inf if found.min_scale is None else -found.min_scale,
            -torch.inf if found.max_scale is None else found.max_scale,
            0.0 if is_nan else found.largest_update,
            float(is_nan),  # a reduction may drop a NaN
        ]
        tops[group_id] = torch.tensor(largest, dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=group)
    rows = zip(GROUP_NAMES, sums.tolist(), tops.tolist(), strict=True)
    return {name: _describe(counts, largest) for name, counts, largest in rows if counts[0]}


def _describe(counts: list[float], largest: list[float]) -> dict[str, float | int | None]:
    elements, low, high = counts[0], -largest[0], largest[1]
    return {
        **{name: count / elements for name, count in zip(SHARES, counts[1:], strict=True)},
        "min_scale": int(low) if abs(low) != torch.inf else None,
        "max_scale": int(high) if abs(high) != torch.inf else None,
        "largest_update": torch.nan if largest[3] > 0 else largest[2],
    }


def breaches(report: Report, limits: NumericsLimits, section: str) -> Iterator[str]:
    """A line for every number beyond its limit: where, expected, got, remedy."""
    for name, found in report.items():
        for key, limit in limits.model_dump().items():
            value: Any = found[key]
            if limit is not None and not value <= limit:  # also when NaN
                yield (
                    f"optim.numerics.{section}.{key}: group {name}: expected at most {limit:g}, "
                    f"got {value:.3g}; {_REMEDIES[key]}"
                )


def check_report(report: Report, config: NumericsConfig) -> list[str]:
    """The warnings that a report gives.

    Raises:
        NumericsError: it is beyond a limit that stops the run; on every rank alike.
    """
    fatal = list(breaches(report, config.stop, "stop"))
    if fatal:
        raise NumericsError("; ".join(fatal))
    return list(breaches(report, config.warn, "warn"))
