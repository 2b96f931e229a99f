"""Three FP8 steps of one layout, and whether what is left of them is what the weights say."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from moe_comm.local import LocalDispatcher

from moe_runtime.build import build_optimizer
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.runtime import Runtime
from tests.dist.layout_case import Case, batch, build, run_lane


@dataclass
class Trained:
    """What three steps gave.

    Args:
        losses: main loss of each step, mean over the global batch, before its update.
        after: loss of the trained weights through the casts that the run holds.
        fresh: the same through casts made anew. Both None where a rank does not hold the whole model.
    """

    losses: list[float]
    after: float | None
    fresh: float | None


def train_fp8(case: Case, rank: int, forgets: bool = True) -> Trained:
    """Three ZeRO steps.

    Args:
        forgets: False: nobody drops casts of weights, as if that had been left out.
    """
    runtime = build(case, rank)
    if not forgets:
        runtime.weight_casts.drop = lambda: None  # type: ignore[method-assign]
    optimizer = build_optimizer(runtime)
    losses = []
    for step in range(3):
        tokens = batch(runtime.config, step)
        optimizer.zero_grad()
        scalars = run_lane(runtime, tokens, optimizer.end_microbatch)
        total = torch.tensor(scalars.totals.get("loss", 0.0), dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(float(total) / tokens.shape[0])
        if runtime.tied_embedding is not None and runtime.groups.tied is not None:
            dist.all_reduce(runtime.tied_embedding.grad_accum, group=runtime.groups.tied)  # type: ignore[attr-defined]
        assert not optimizer.step(5e-3).skipped
    if runtime.mesh.world_size > 1:
        return Trained(losses, None, None)
    return Trained(losses, *_compare_casts(runtime))


@torch.no_grad()
def _compare_casts(runtime: Runtime) -> tuple[float, float]:
    config, (held,) = runtime.config, runtime.chunks.values()
    fresh = Transformer(
        config.model,
        dtype=torch.bfloat16,
        dispatcher=LocalDispatcher(config.model.num_experts, keep_tiles=True),
    )
    fresh.load_state_dict(held.state_dict())
    use_fp8(fresh, Policy(config.fp8), WeightCasts())
    tokens = batch(config, 9)
    return float(held.losses(tokens).loss), float(fresh.losses(tokens).loss)
