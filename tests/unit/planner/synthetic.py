"""A trace as a recorder would write it, made of a timeline."""

from collections.abc import Iterator

from moe_runtime.planner.timeline import Timeline
from moe_runtime.planner.trace import Event, Trace
from moe_runtime.schedule import Program


def trace_of(timeline: Timeline, program: Program, begin: float = 5.0) -> Trace:
    """A lane for each pipeline rank; exchanges and waits stand at the end of their entries."""
    return Trace(tuple(_events(timeline, begin)), program, tuple(range(program.num_ranks)), step=3)


def _events(timeline: Timeline, begin: float) -> Iterator[Event]:
    for rank, row in enumerate(timeline.rows):
        for span in row:
            end = begin + span.end
            yield Event(rank, "action", str(span.entry), begin + span.start, end)
            yield Event(rank, "phase", "attend layers.0", begin + span.start, end)
            if span.comm:
                yield Event(rank, "exchange", "dispatch layers.0", end - span.comm, end)
            if span.exposed:
                yield Event(rank, "wait", "exchange", end - span.exposed, end)
