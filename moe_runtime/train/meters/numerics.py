"""Numerics of a step: gradient norms and updates by class, gradients that are not finite, casts to FP8.

Norms come with every step, for the sums are needed anyway. The rest costs passes over weights and values, so
it is sampled, every `metrics.numerics_every` steps, and joined over ranks in two small reductions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.fp8.watch import CLASSES, COUNTS, TOPS, Fp8Watch
from moe_runtime.parallel.zero import StepResult
from moe_runtime.train.guard.skips import Blame


def is_sampled(every: int, step: int) -> bool:
    """True if the step after `step` steps is sampled."""
    return every > 0 and (step + 1) % every == 0


def of_gradients(result: StepResult, blames: Sequence[Blame]) -> dict[str, Any]:
    """What a record says of gradients and updates."""
    names = {blame["name"] for blame in blames if "name" in blame}
    return {"grad_norms": result.grad_norms, "updates": result.updates, "nonfinite": len(names)}


def of_casts(watch: Fp8Watch, group: dist.ProcessGroup | None, world_size: int) -> dict[str, Any]:
    """What a record says of a sampled step's casts, over all ranks; a collective call.

    Args:
        watch: of this rank.
        group: over CPU tensors.
    """
    sums = torch.zeros(len(CLASSES) * len(COUNTS) + 2, dtype=torch.float64)
    tops = torch.full((len(CLASSES), len(TOPS)), -torch.inf, dtype=torch.float64)
    counts = sums[:-2].view(len(CLASSES), len(COUNTS))
    for row, kind in enumerate(CLASSES):
        if kind in watch.classes:
            counts[row], tops[row] = watch.classes[kind].counts.cpu(), watch.classes[kind].tops.cpu()
    if watch.error is not None:
        sums[-2:] = watch.error.cpu()
    # Not every backend lets a NaN win a maximum.
    is_nan = tops.isnan().double()
    if world_size > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(
            both := torch.stack((tops.nan_to_num(nan=0.0), is_nan)), dist.ReduceOp.MAX, group=group
        )
        tops, is_nan = both.unbind()
    tops = tops.masked_fill(is_nan > 0, math.nan)
    rows = zip(CLASSES, counts.tolist(), tops.tolist(), strict=True)
    wrong, right = sums[-2:].tolist()
    return {
        "fp8": {kind: _describe(found, top) for kind, found, top in rows if found[0]},
        "fp8_error": math.sqrt(wrong / right) if right else None,
    }


def _describe(counts: list[float], tops: list[float]) -> dict[str, float | None]:
    elements, underflows, saturated = counts
    amax, scale_max, negated_min = tops
    return {
        "amax": amax,
        "underflow": underflows / elements,
        "saturation": saturated / elements,
        "scale_min": None if negated_min == -math.inf else -negated_min,
        "scale_max": None if scale_max == -math.inf else scale_max,
    }
