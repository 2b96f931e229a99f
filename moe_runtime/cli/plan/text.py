"""A plan in a terminal: what it is of, time in three worlds, the step, memory, traffic, and what matters."""

from collections.abc import Sequence
from dataclasses import asdict

from moe_runtime.config.derive import tokens_per_step
from moe_runtime.planner.hardware.estimate import WORLDS
from moe_runtime.planner.reckon.plan import Plan
from moe_runtime.planner.reckon.token_flops import CONVENTIONS, model_flops_utilisation

GIGA, GIB, HOUR_S, MINUTE_S = 1e9, 2**30, 3600.0, 60.0
_SHOWN = 8  # figures of the sensitivity table

Row = Sequence[str]


def describe(plan: Plan) -> str:
    """All tables, a blank line between them."""
    parts = (_head(plan), _worlds(plan), _phases(plan), _run(plan), _flops(plan))
    return "\n\n".join((*parts, _memory(plan), _traffic(plan), _sensitivity(plan)))


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def _head(plan: Plan) -> str:
    layout, config, counts = plan.layout, plan.config, plan.counts
    gpus, batch = layout.world_size, config.batch
    return "\n".join(
        (
            f"{config.name} on {plan.cluster.name}: {gpus:,} x {plan.cluster.accelerator.name}, "
            f"{config.precision}",
            f"{counts.total / GIGA:.2f}B parameters, {counts.active / GIGA:.1f}B active"
            + (f", and {counts.mtp / GIGA:.1f}B of MTP" if counts.mtp else ""),
            f"pp {layout.pp}, dp {layout.dp}, ep {layout.ep}, {plan.here.step.program.name}, "
            f"{layout.num_microbatches} microbatches of {batch.micro_batch_size} x {batch.seq_len:,} tokens "
            f"a lane, {tokens_per_step(config):,} tokens a step",
            f"assumed: rows of the fullest rank's experts {plan.imbalance:g} times the mean",
        )
    )


def _worlds(plan: Plan) -> str:
    worlds = [plan.worlds[name] for name in WORLDS]
    hours = [each.run.steady_gpu_hours for each in worlds]
    return table(
        [
            ["all figures at their", "slow end", "centre", "fast end"],
            ["step, s", *(f"{each.step.seconds:.3f}" for each in worlds)],
            ["tokens/s/GPU", *(f"{each.tokens_per_s_per_gpu:,.0f}" for each in worlds)],
            ["GPU hours, all steps full", *(f"{one:,.0f}" for one in hours)],
            ["with ramp and failures", *(f"{each.run.gpu_hours_with_failures:,.0f}" for each in worlds)],
            [
                "cost of these, US$",
                *(f"{each.run.cost(each.run.gpu_hours_with_failures):,.0f}" for each in worlds),
            ],
        ]
    )


def _phases(plan: Plan) -> str:
    step = plan.here.step
    rows = [["seconds of a step", *step.phases, "exchanges in sight"]]
    times = [f"{seconds:.3f}" for seconds in step.phases.values()]
    rows.append(["mean of pipeline ranks", *times, f"{step.exposed:.3f}"])
    for rank in range(step.program.num_ranks):
        own = [f"{seconds:.3f}" for seconds in step.phases_of(rank).values()]
        rows.append([f"pipeline rank {rank}", *own, f"{step.timeline.exposed(rank):.3f}"])
    return table(rows)


def _run(plan: Plan) -> str:
    run = plan.here.run
    fails, days = run.failures, run.gpu_hours_with_failures / plan.layout.world_size / 24
    line = f"{run.steps:,} steps, {run.tokens:,} tokens: {days:,.1f} days"
    if not fails.restarting:
        return line
    return (
        f"{line}, {fails.training_share:.1%} of them training; a failure every "
        f"{fails.between_failures / HOUR_S:,.1f} h, best saved every {fails.interval / MINUTE_S:.0f} min"
    )


def _flops(plan: Plan) -> str:
    shares = model_flops_utilisation(
        plan.flops, plan.here.tokens_per_s_per_gpu, plan.cluster.accelerator.peak_tflops
    )
    rows = [["attention counted", "GFLOP/token", *(f"MFU, {name.replace('_', ' ')}" for name in shares)]]
    for one in CONVENTIONS:
        cells = [f"{shares[peak][one]:.1%}" for peak in shares]
        rows.append([one.replace("_mtp", ", with MTP"), f"{plan.flops.total(one) / GIGA:.1f}", *cells])
    return table(rows)


def _memory(plan: Plan) -> str:
    kinds = list(plan.memory[0].by_kind())
    rows = [["GB (10^9 bytes)", *(kind.replace("_", " ") for kind in kinds), "total", "GiB"]]
    for rank, memory in enumerate(plan.memory):
        cells = [f"{size / GIGA:.1f}" for size in memory.by_kind().values()]
        cells += [f"{memory.total / GIGA:.1f}", f"{memory.total / GIB:.1f}"]
        rows.append([f"pipeline rank {rank}", *cells])
    verdict = "fits" if plan.misfit is None else "DOES NOT FIT"
    return f"{table(rows)}\n{verdict}: {plan.memory_limit / GIGA:.0f} GB an accelerator"


def _traffic(plan: Plan) -> str:
    """Of the pipeline rank that sends the most over the network."""
    busiest = max(range(len(plan.traffic)), key=lambda rank: plan.traffic[rank].total.network)
    sent = asdict(plan.traffic[busiest])
    rows = [[f"GB that rank {busiest} sends a step", *(name.replace("_", " ") for name in sent), "total"]]
    for link in ("network", "fast"):
        whole = getattr(plan.traffic[busiest].total, link)
        cells = [f"{one[link] / GIGA:.2f}" for one in sent.values()]
        rows.append([link, *cells, f"{whole / GIGA:.2f}"])
    return table(rows)


def _sensitivity(plan: Plan) -> str:
    rows = [["tokens/s/GPU with one figure at its", "low end", "high end"]]
    for one in plan.sensitivity[:_SHOWN]:
        rows.append([one.figure, f"{one.low:+.1%}", f"{one.high:+.1%}"])
    return table(rows)
