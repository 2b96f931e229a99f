"""What the spans of a step of ours say: how much of the exchange pairs hide, and how the simulator does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_pipeline.calibrate import Step
from moe_runtime.cli.bench_pipeline.settings import Settings
from moe_runtime.planner.figures import figures_of
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.measured_costs import measured_costs
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import Event, Trace, write_trace
from moe_runtime.schedule.action import Program, is_transfer


def trace_of(step: Step, settings: Settings) -> Trace | None:
    """The trace of one step; None of a peer's, who keeps no spans."""
    if step[0]["spans"] is None:
        return None
    program = Program.from_text(step[0]["program"])
    rows = tuple(tuple(entry for entry in row if not is_transfer(entry)) for row in program.rows)
    spans = [(rank, *span) for rank, said in enumerate(step) for span in said["spans"]]
    begin = min(start for _, lane, _, start, _ in spans if lane == "action")
    events = tuple(Event(rank, lane, name, a - begin, b - begin) for rank, lane, name, a, b in spans)
    pp_ranks = tuple(rank // settings.ep for rank in range(len(step)))
    return Trace(events, replace(program, rows=rows), pp_ranks)


def figures(trace: Trace) -> dict[str, Any]:
    """Of a traced step: exchange hidden in pairs, ranks' idle share, most lives, simulated over measured."""
    timeline = timeline_of(trace)
    told = figures_of(timeline)
    ranks = range(len(timeline.rows))
    return {
        "hidden_in_pairs": told.hidden_in_pairs_fraction,
        "bubble": told.bubble_fraction,
        "peak_live": max(map(timeline.peak_memory, ranks)),
        "simulated": simulate(trace.program, measured_costs(trace)).makespan / timeline.makespan,
    }


def write_traces(last_round: dict[str, Step], settings: Settings, folder: Path) -> None:
    """One NAME.json for each contender of ours, for Perfetto and for `moe-runtime schedule --trace`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, step in last_round.items():
        trace = trace_of(step, settings)
        if trace is not None:
            write_trace(trace, folder / f"{name}.json")
