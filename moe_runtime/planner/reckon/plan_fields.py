"""A plan as plain values, for `--json`: numbers in the units that their names say, bytes as bytes."""

from dataclasses import asdict
from typing import Any

from moe_runtime.config.derive import tokens_per_step
from moe_runtime.planner.reckon.plan import Plan, Reckoned
from moe_runtime.planner.reckon.token_flops import CONVENTIONS, model_flops_utilisation


def plan_fields(plan: Plan) -> dict[str, Any]:
    """One JSON object.

    `flops_per_token` is causal and without MTP; `flops` has the other conventions and the parts. `gpu_hours`
    and `cost_usd` are those of a run whose every step has the full batch, as reports give them; `run` has
    them with the ramp and with failures.
    """
    here = plan.here
    step = here.step
    return {
        "params_total": plan.counts.total,
        "params_active": plan.counts.active,
        "flops_per_token": plan.flops.total("causal"),
        "step_s": step.seconds,
        "tokens_per_s_per_gpu": here.tokens_per_s_per_gpu,
        "gpu_hours": here.run.steady_gpu_hours,
        "cost_usd": here.run.cost(here.run.steady_gpu_hours),
        "bubble_s": step.bubble,
        "bubble_fraction": step.bubble / step.seconds,
        "exposed_comm_s": step.exposed,
        "phases_s": step.phases,
        "memory": _memory(plan),
        "traffic": {"ranks": [one.to_plain() for one in plan.traffic]},
        "sensitivity": [asdict(one) for one in plan.sensitivity],
        "flops": _flops(plan),
        "mfu": model_flops_utilisation(
            plan.flops, here.tokens_per_s_per_gpu, plan.cluster.accelerator.peak_tflops
        ),
        "params_mtp": plan.counts.mtp,
        "layout": _layout(plan),
        "run": _run(here),
        "worlds": {
            name: {
                "step_s": each.step.seconds,
                "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu,
                "gpu_hours": each.run.steady_gpu_hours,
                "cost_usd": each.run.cost(each.run.steady_gpu_hours),
            }
            for name, each in plan.worlds.items()
        },
        "assumptions": {
            "cluster": plan.cluster.name,
            "world": plan.world,
            "imbalance": plan.imbalance,
            "precision": plan.config.precision,
        },
    }


def _memory(plan: Plan) -> dict[str, Any]:
    ranks = [
        {"rank": rank, "total": one.total, **one.by_kind(), "at_update": one.at_update}
        for rank, one in enumerate(plan.memory)
    ]
    return {
        "limit_bytes": plan.memory_limit,
        "fits": plan.misfit is None,
        "fullest_rank": plan.fullest,
        "ranks": ranks,
    }


def _flops(plan: Plan) -> dict[str, Any]:
    return {
        "parts": plan.flops.parts,
        "mtp": plan.flops.mtp,
        **{name: plan.flops.total(name) for name in CONVENTIONS},
    }


def _layout(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "world_size": layout.world_size,
        "pp": layout.pp,
        "dp": layout.dp,
        "ep": layout.ep,
        "schedule": plan.here.step.program.name,
        "microbatches": layout.num_microbatches,
        "layers_per_stage": [len(layers) for layers in layout.layers],
        "tokens_per_step": tokens_per_step(plan.config),
    }


def _run(here: Reckoned) -> dict[str, Any]:
    run, update = here.run, here.step.update
    fails = run.failures
    return {
        "tokens": run.tokens,
        "steps": run.steps,
        "gpu_hours_with_ramp": run.gpu_hours,
        "gpu_hours_with_ramp_and_failures": run.gpu_hours_with_failures,
        "cost_usd_with_ramp_and_failures": run.cost(run.gpu_hours_with_failures),
        "training_share": fails.training_share,
        "between_failures_s": fails.between_failures if run.failures.restarting else None,
        "checkpoint_interval_s": fails.interval if run.failures.restarting else None,
        "pairs_per_rank": here.step.num_pairs,
        "usual_pair": _pair(here),
        "moe_block_s": {
            name: {
                "forward": piece.forward[1],
                "input_grad": piece.input_grad[1],
                "weight_grad": piece.weight_grad[1],
            }
            for name, piece in here.step.times.block().items()
        },
        "optimizer_s": asdict(update),
        "phases_by_rank_s": [here.step.phases_of(rank) for rank in range(here.step.program.num_ranks)],
    }


def _pair(here: Reckoned) -> dict[str, Any] | None:
    """The overlapped pair that runs most often."""
    stages = here.step.usual_pair
    if stages is None:
        return None
    flown = here.step.times.pair(*stages)
    return {
        "stages": list(stages),
        "span_s": flown.span,
        "computing_s": flown.computing,
        "exchanges_s": flown.flying,
    }
