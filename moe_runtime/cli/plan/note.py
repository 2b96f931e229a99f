"""A plan in a few lines, as the comment of a config: what the ladder of `configs/run` has at its head."""

from moe_runtime.cli.plan.text import figure, short
from moe_runtime.config.derive import tokens_per_step
from moe_runtime.planner.hardware.estimate import WORLDS
from moe_runtime.planner.host.step import host_step
from moe_runtime.planner.reckon.plan import Plan
from moe_runtime.planner.reckon.token_flops import model_flops_utilisation

_GIGA, _HOUR_S, _DAY_S = 1e9, 3600.0, 86_400.0


def note(plan: Plan) -> list[str]:
    """Comment lines: the command that makes them, then machine, step, memory and the whole run."""
    name, layout = plan.config.name, plan.layout
    device = f"{layout.world_size:,} x {plan.cluster.accelerator.name}"
    schedule = f"pp {layout.pp}, dp {layout.dp}, ep {layout.ep}, {plan.here.step.program.name}"
    lines = [f"{device}: {schedule}, {short(plan.counts.total)} weights, {short(plan.counts.active)} active"]
    lines += _shared_step(plan) if plan.cluster.host is not None else _step(plan)
    fullest, limit = plan.memory[plan.fullest].total, plan.memory_limit
    lines.append(f"memory: {fullest / _GIGA:.3g} of {limit / _GIGA:.3g} GB on the fullest rank")
    head = f"# Plan, by moe-runtime plan {name} --cluster {plan.cluster.name} --note:"
    return [head, *(f"#   {line}" for line in lines)]


def _step(plan: Plan) -> list[str]:
    """Ranks with a device each: the central world, and the others as a range."""
    step, run = plan.here.step, plan.here.run
    seconds = sorted(plan.worlds[world].step.seconds for world in WORLDS)
    rate = plan.here.tokens_per_s_per_gpu
    peaks = model_flops_utilisation(plan.flops, rate, plan.cluster.accelerator.peak_tflops)
    bubble = step.phases["bubble"] / step.seconds
    days = run.gpu_hours_with_failures * _HOUR_S / plan.layout.world_size
    return [
        f"step: {step.seconds:.3g} s ({seconds[0]:.3g} to {seconds[-1]:.3g}), bubble {bubble:.1%}, "
        f"exchanges in sight {step.exposed / step.seconds:.1%}",
        f"{rate:,.0f} tokens/s a GPU, MFU {peaks['bf16_peak']['causal']:.1%} of the BF16 peak",
        f"run: {run.steps:,} steps of {tokens_per_step(plan.config):,} tokens, {_long(days)}, "
        f"{figure(run.gpu_hours_with_failures)} GPU hours",
    ]


def _shared_step(plan: Plan) -> list[str]:
    """Ranks that share the cores of one machine."""
    assert plan.cluster.host is not None
    step, tokens, steps = (
        host_step(plan.config, plan.cluster),
        tokens_per_step(plan.config),
        plan.here.run.steps,
    )
    return [
        f"step: {step.step_s:.3g} s on {plan.cluster.host.cores} cores, {tokens / step.step_s:,.0f} tokens/s",
        f"run: {steps:,} steps of {tokens:,} tokens, {_long(steps * step.step_s)}",
    ]


def _long(seconds: float) -> str:
    if seconds >= _DAY_S:
        return f"{seconds / _DAY_S:.3g} days"
    return f"{seconds / _HOUR_S:.2g} hours" if seconds >= _HOUR_S else f"{seconds / 60:.2g} minutes"
