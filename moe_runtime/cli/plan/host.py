"""A plan of processes that share the cores of one machine: the step phase by phase, and its JSON."""

from typing import Any

from moe_runtime.cli.plan.text import table
from moe_runtime.config.derive import tokens_per_step
from moe_runtime.planner.host.step import HostStep
from moe_runtime.planner.reckon.plan import Plan


def host_fields(plan: Plan, step: HostStep) -> dict[str, Any]:
    """The keys of a plan's JSON that time decides, as ranks share cores."""
    tokens_per_s = tokens_per_step(plan.config) / step.step_s / plan.layout.world_size
    hours = plan.here.run.steps * step.step_s * plan.layout.world_size / 3600
    whole = {
        "step_s": step.step_s,
        "tokens_per_s_per_gpu": tokens_per_s,
        "gpu_hours": hours,
        "cost_usd": plan.here.run.cost(hours),
    }
    return {
        **whole,
        "worlds": {"central": whole},
        "bubble_s": step.bubble_fraction * step.step_s,
        "bubble_fraction": step.bubble_fraction,
        "exposed_comm_s": step.exposed_fraction * step.step_s,
        "phases_s": {**_phases(step.parts), "optimizer": step.update_s},
    }


def _phases(parts: dict[str, float]) -> dict[str, float]:
    """By the names of every plan; a pair's phases count as those of its F, B and W, so 1F1B is nothing."""
    named = {"1F": "forward", "1B": "input_grad", "1W": "weight_grad"}
    others = {name: seconds for name, seconds in parts.items() if name not in named.values()}
    return {**{name: parts[own] for name, own in named.items()}, "1F1B": 0.0, **others}


def describe_host(plan: Plan, step: HostStep) -> str:
    """The step in seconds, and what of it ranks do and wait for, in the mean."""
    assert plan.cluster.host is not None
    rate = tokens_per_step(plan.config) / step.step_s
    names = [name.replace("_", " ") for name in step.parts]
    rows = [["seconds, mean of ranks", *names, "update", "step"]]
    times = [*step.parts.values(), step.update_s, step.step_s]
    rows.append([f"{plan.layout.world_size} ranks on {plan.cluster.host.cores} cores", *map(_seconds, times)])
    return (
        f"{table(rows)}\n{rate:,.0f} tokens/s of all ranks. The tables below are of ranks that share nothing."
    )


def _seconds(value: float) -> str:
    return f"{value:.3f}"
