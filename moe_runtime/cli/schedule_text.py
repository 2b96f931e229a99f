"""What `moe-runtime schedule` says about schedules and traces, as text and as JSON fields."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.planner.costs import Costs
from moe_runtime.planner.figures import figures_of
from moe_runtime.planner.outcome import Outcome
from moe_runtime.planner.timeline import Timeline
from moe_runtime.planner.trace import Trace
from moe_runtime.schedule import Program


def describe(outcome: Outcome, shown: Program) -> str:
    """One schedule: its program, what the check found, and what the simulation says.

    Args:
        shown: the outcome's program, with or without transfers.
    """
    program, report, timeline = outcome.program, outcome.report, outcome.timeline
    head = ("rank", "stages", "parameters", "peak live", "W owed", "memory", "bubble", "exposed")
    rows: list[tuple[str, ...]] = [head]
    for rank in range(program.num_ranks):
        stages = " ".join(f"{stage}{chr(39) * direction}" for direction, stage in program.stages_of(rank))
        checked = (report.peak_live[rank], report.peak_pending_weight_grads[rank])
        memory = f"{timeline.peak_memory(rank):g}"
        held = (f"{outcome.parameters(rank):g}x", *map(str, checked), memory)
        rows.append((str(rank), stages, *held, *_idle(timeline, rank)))
    figures = outcome.figures
    time = _time(timeline)
    least = f"lower bound {time(outcome.bound)}, {outcome.gap:.1%} above it"
    lines = [
        shown.to_text(),
        _table(rows),
        "",
        f"makespan {time(figures.makespan)} ({least}); bubble {figures.bubble_fraction:.1%}",
        f"exposed exchange {figures.exposed_comm_fraction:.1%}; "
        f"hidden {_share(figures.hidden_comm_fraction)}, "
        f"in overlapped pairs {_share(figures.hidden_in_pairs_fraction)}",
    ]
    if not outcome.is_within_cap:
        lines.append(f"memory {outcome.peak_memory:g} is over the cap of {outcome.cap:g}")
    return "\n".join([*lines, ""])


def compare(outcomes: Sequence[Outcome], refused: Mapping[str, str]) -> str:
    """Schedules side by side, in the order given."""
    head = ("schedule", "makespan", "bubble", "exposed", "hidden", "memory", "parameters", "above bound", "")
    rows: list[tuple[str, ...]] = [head]
    for outcome in outcomes:
        program, figures = outcome.program, outcome.figures
        held = max(map(outcome.parameters, range(program.num_ranks)))
        rows.append(
            (
                program.name,
                _time(outcome.timeline)(figures.makespan),
                f"{figures.bubble_fraction:.1%}",
                f"{figures.exposed_comm_fraction:.1%}",
                _share(figures.hidden_comm_fraction),
                f"{outcome.peak_memory:g}",
                f"{held:g}x",
                f"{outcome.gap:.1%}",
                "" if outcome.is_within_cap else "over the cap",
            )
        )
    lines = [_table(rows), ""]
    lines += [f"not admitted: {reason}" for reason in refused.values()]
    lines.append("memory: most live microbatches of a rank, in units of one in a P-th of the model")
    return "\n".join(lines)


def describe_trace(measured: Timeline, simulated: Timeline, costs: Costs) -> str:
    """A measured step beside the simulated one, rank by rank, and the costs measured in it."""
    ours, theirs, time = figures_of(measured), figures_of(simulated), _time(measured)
    rows = [
        ("", "measured", "simulated"),
        ("makespan", time(ours.makespan), time(theirs.makespan)),
        ("bubble", f"{ours.bubble_fraction:.1%}", f"{theirs.bubble_fraction:.1%}"),
        ("exposed exchange", f"{ours.exposed_comm_fraction:.1%}", f"{theirs.exposed_comm_fraction:.1%}"),
        ("exchange hidden", _share(ours.hidden_comm_fraction), _share(theirs.hidden_comm_fraction)),
        (
            "  in overlapped pairs",
            _share(ours.hidden_in_pairs_fraction),
            _share(theirs.hidden_in_pairs_fraction),
        ),
    ]
    ranks = [("rank", "bubble", "exposed")]
    ranks += [(label, *_idle(measured, rank)) for rank, label in enumerate(measured.labels)]
    stages: list[tuple[str, ...]] = [("stage", "F", "I", "W", "C", "CB")]
    for number, stage in enumerate(costs.stages):
        parts = (stage.forward, stage.input_grad, stage.weight_grad, stage.forward_comm, stage.backward_comm)
        stages.append((str(number), *map(time, parts)))
    lines = [
        measured.title,
        _table(rows),
        f"measured / simulated: {_ratio(measured, simulated):.3f}",
        "",
        _table(ranks),
        "",
        _table(stages),
        f"transfer {time(costs.transfer)}; of what pairs could hide, {costs.hidden:.1%} is hidden",
    ]
    return "\n".join([*lines, ""])


def as_fields(outcome: Outcome, shown: Program) -> dict[str, Any]:
    """One schedule as JSON fields."""
    program, timeline = outcome.program, outcome.timeline
    return {
        "schedule": program.name,
        "num_ranks": program.num_ranks,
        "num_microbatches": program.num_microbatches,
        "num_stages": program.num_stages,
        "placement": [list(ranks) for ranks in program.placement],
        "program": shown.to_text(),
        "report": asdict(outcome.report),
        "parameters": [outcome.parameters(rank) for rank in range(program.num_ranks)],
        "lower_bound": outcome.bound,
        "gap": outcome.gap,
        "is_within_cap": outcome.is_within_cap,
        **_timeline_fields(timeline),
    }


def trace_fields(trace: Trace, measured: Timeline, simulated: Timeline, costs: Costs) -> dict[str, Any]:
    """A measured step as JSON fields; times in seconds."""
    pairs = [
        {"forward": ahead, "backward": back, "time": time} for (ahead, back), time in costs.pairs.items()
    ]
    return {
        "schedule": trace.program.name,
        "step": trace.step,
        "rows": list(measured.labels),
        "measured": _timeline_fields(measured),
        "simulated": _timeline_fields(simulated),
        "measured_over_simulated": _ratio(measured, simulated),
        "costs": {
            "stages": [asdict(stage) for stage in costs.stages],
            "transfer": costs.transfer,
            "hidden": costs.hidden,
            "pairs": pairs,
        },
    }


def _timeline_fields(timeline: Timeline) -> dict[str, Any]:
    ranks = range(len(timeline.rows))
    return {
        **asdict(figures_of(timeline)),
        "unit": timeline.unit,
        "bubble": [timeline.bubble(rank) for rank in ranks],
        "exchange": [timeline.comm(rank) for rank in ranks],
        "exposed": [timeline.exposed(rank) for rank in ranks],
        "peak_memory": [timeline.peak_memory(rank) for rank in ranks],
    }


def _idle(timeline: Timeline, rank: int) -> tuple[str, str]:
    """A rank's bubble and exposed exchange, in time and as a share of the step."""
    time, whole = _time(timeline), timeline.makespan or 1.0
    bubble, exposed = timeline.bubble(rank), timeline.exposed(rank)
    return f"{time(bubble)} ({bubble / whole:.1%})", f"{time(exposed)} ({exposed / whole:.1%})"


def _ratio(measured: Timeline, simulated: Timeline) -> float:
    if not simulated.makespan:
        raise ConfigError(f"{measured.title}: expected entries that take time, got none; trace another step")
    return measured.makespan / simulated.makespan


def _time(timeline: Timeline) -> Callable[[float], str]:
    """Writes a time of the timeline with its unit."""
    scale, unit = timeline.display_unit
    return lambda time: f"{time * scale:.4g} {unit}".rstrip()


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
