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


def short(number: float) -> str:
    """671,026,404,352 as 671.0B: four digits, and thousands, millions or billions."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:,.1f}{letter}"
    return f"{number:,.3g}"


def figure(number: float) -> str:
    """A number with four digits or more, whatever its size."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _head(plan: Plan) -> str:
    layout, config, counts = plan.layout, plan.config, plan.counts
    gpus, batch = layout.world_size, config.batch
    return "\n".join(
        (
            f"{config.name} on {plan.cluster.name}: {gpus:,} x {plan.cluster.accelerator.name}, "
            f"{config.precision}",
            f"{short(counts.total)} parameters, {short(counts.active)} active"
            + (f", and {short(counts.mtp)} of MTP" if counts.mtp else ""),
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
            ["step, s", *(figure(each.step.seconds) for each in worlds)],
            ["tokens/s/GPU", *(figure(each.tokens_per_s_per_gpu) for each in worlds)],
            ["GPU hours, all steps full", *(figure(one) for one in hours)],
            ["cost of these, US$", *(figure(each.run.cost(each.run.steady_gpu_hours)) for each in worlds)],
            ["with ramp and failures", *(figure(each.run.gpu_hours_with_failures) for each in worlds)],
            [
                "cost of these, US$",
                *(figure(each.run.cost(each.run.gpu_hours_with_failures)) for each in worlds),
            ],
        ]
    )


def _phases(plan: Plan) -> str:
    step = plan.here.step
    unit, scale = ("seconds", 1.0) if step.seconds >= 1 else ("milliseconds", 1e3)
    rows = [[f"{unit} of a step", *step.phases, "exchanges in sight"]]
    times = [f"{scale * seconds:.3f}" for seconds in step.phases.values()]
    rows.append(["mean of pipeline ranks", *times, f"{scale * step.exposed:.3f}"])
    for rank in range(step.program.num_ranks):
        own = [f"{scale * seconds:.3f}" for seconds in step.phases_of(rank).values()]
        rows.append([f"pipeline rank {rank}", *own, f"{scale * step.timeline.exposed(rank):.3f}"])
    return "\n\n".join((table(rows), *_pair(plan), *_block(plan)))


def _pair(plan: Plan) -> list[str]:
    """The overlapped pair that runs most often, if there is one."""
    step = plan.here.step
    stages = step.usual_pair
    if stages is None:
        return []
    flown = step.times.pair(*stages)
    hidden = 1 - (flown.span - flown.computing) / flown.flying if flown.flying else 1.0
    return [
        f"overlapped pair of stages {stages[0]} and {stages[1]}: {1e3 * flown.span:.4g} ms, "
        f"exchanges {1e3 * flown.flying:.4g} ms, {hidden:.1%} of them hidden"
    ]


def _block(plan: Plan) -> list[str]:
    """The phases of a MoE block, as they are beside exchanges."""
    block = plan.here.step.times.block()
    if not block:
        return []
    rows = [["ms of one MoE block beside exchanges", *block]]
    for place, name in enumerate(("forward", "backward for inputs", "backward for weights")):
        passes = ((one.forward, one.input_grad, one.weight_grad)[place][1] for one in block.values())
        rows.append([name, *(f"{1e3 * seconds:.3g}" for seconds in passes)])
    return [table(rows)]


def _run(plan: Plan) -> str:
    run = plan.here.run
    fails, days = run.failures, run.gpu_hours_with_failures / plan.layout.world_size / 24
    line = f"{run.steps:,} steps, {run.tokens:,} tokens: {_long(days)}"
    if not fails.restarting:
        return line
    return (
        f"{line}, {fails.training_share:.1%} of them training; a failure every "
        f"{fails.between_failures / HOUR_S:,.1f} h, best saved every {fails.interval / MINUTE_S:.0f} min"
    )


def _long(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 86_400:.3g} seconds"


def _flops(plan: Plan) -> str:
    shares = model_flops_utilisation(
        plan.flops, plan.here.tokens_per_s_per_gpu, plan.cluster.accelerator.peak_tflops
    )
    rows = [["attention counted", "FLOP/token", *(f"MFU, {name.replace('_', ' ')}" for name in shares)]]
    for one in CONVENTIONS:
        cells = [f"{shares[peak][one]:.1%}" for peak in shares]
        rows.append([one.replace("_mtp", ", with MTP"), short(plan.flops.total(one)), *cells])
    return table(rows)


def _memory(plan: Plan) -> str:
    kinds = list(plan.memory[0].by_kind())
    rows = [["GB (10^9 bytes)", *(kind.replace("_", " ") for kind in kinds), "total", "GiB"]]
    for rank, memory in enumerate(plan.memory):
        cells = [_gigas(size) for size in memory.by_kind().values()]
        cells += [_gigas(memory.total), _gigas(memory.total * GIGA / GIB)]
        rows.append([f"pipeline rank {rank}", *cells])
    verdict = "fits" if plan.misfit is None else "DOES NOT FIT"
    return f"{table(rows)}\n{verdict}: {plan.memory_limit / GIGA:.0f} GB an accelerator"


def _gigas(size: float) -> str:
    """Bytes in 10^9 of them; small ones with three digits."""
    return f"{size / GIGA:.1f}" if size >= GIGA or size == 0 else f"{size / GIGA:.3g}"


def _traffic(plan: Plan) -> str:
    """Of the pipeline rank that sends the most over the network."""
    busiest = max(range(len(plan.traffic)), key=lambda rank: plan.traffic[rank].total.network)
    sent = asdict(plan.traffic[busiest])
    rows = [[f"GB that rank {busiest} sends a step", *(name.replace("_", " ") for name in sent), "total"]]
    for link in ("network", "fast"):
        whole = getattr(plan.traffic[busiest].total, link)
        cells = [_gigas(one[link]) for one in sent.values()]
        rows.append([link, *cells, _gigas(whole)])
    return table(rows)


def _sensitivity(plan: Plan) -> str:
    rows = [["tokens/s/GPU with one figure at its", "low end", "high end"]]
    for one in plan.sensitivity[:_SHOWN]:
        rows.append([one.figure, f"{one.low:+.1%}", f"{one.high:+.1%}"])
    return table(rows)
