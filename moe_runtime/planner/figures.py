"""A step in numbers, the same for a simulated and for a measured one."""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.schedule.action import Overlap


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares are of the time of all ranks together, 0 to 1, unless said otherwise.

    Args:
        makespan: from the first entry's start to the last one's end, in the timeline's unit.
        bubble_fraction: ranks in no entry.
        exposed_comm_fraction: ranks that stood still for an expert exchange.
        hidden_comm_fraction: of the exchange, what no rank stood still for; None without any exchange.
        hidden_in_pairs_fraction: the same, within overlapped pairs alone.
    """

    makespan: float
    bubble_fraction: float
    exposed_comm_fraction: float
    hidden_comm_fraction: float | None
    hidden_in_pairs_fraction: float | None


def figures_of(timeline: Timeline) -> Figures:
    """The figures of a timeline."""
    ranks = range(len(timeline.rows))
    whole = timeline.makespan * len(ranks) or 1.0
    spans = [span for row in timeline.rows for span in row]
    return Figures(
        makespan=timeline.makespan,
        bubble_fraction=sum(map(timeline.bubble, ranks)) / whole,
        exposed_comm_fraction=sum(map(timeline.exposed, ranks)) / whole,
        hidden_comm_fraction=_hidden(spans),
        hidden_in_pairs_fraction=_hidden(span for span in spans if isinstance(span.entry, Overlap)),
    )


def _hidden(spans: Iterable[Span]) -> float | None:
    spans = list(spans)
    comm = sum(span.comm for span in spans)
    return 1 - sum(span.exposed for span in spans) / comm if comm else None
