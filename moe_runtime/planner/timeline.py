"""When each rank did what: the common form of a simulated and of a measured step.

The simulator writes it, a trace of a real step is read into it, and the drawing knows nothing else, so
an ideal and a measured step look alike and are measured by the same words:

    busy      an entry runs on the rank (its exposed exchange included)
    bubble    the rest of the step, until the last rank ends
    exposed   exchange that the rank stood still for, within entries
    hidden    1 - exposed / exchange
"""

from dataclasses import dataclass

from moe_runtime.schedule.action import Entry


@dataclass(frozen=True, slots=True)
class Span:
    """One entry of a rank's row on the clock; transfers have none.

    Args:
        entry: what ran.
        start, end: on the timeline's clock; end - start is the entry's own time, waits for other pipeline
            ranks before its first computation not included.
        comm: time that its expert exchanges were under way.
        exposed: of `comm`, what the rank stood still for.
    """

    entry: Entry
    start: float
    end: float
    comm: float = 0.0
    exposed: float = 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A whole step of all pipeline ranks; clocks begin at 0 with the first entry.

    Args:
        title: what a drawing says above it.
        rows: the spans of each pipeline rank, in order; measured, of each global rank.
        memory: per rank, (time, live memory from then on) at every change, in the units of `Costs.live`.
        unit: of the clock: "s", or "" for the costs' own.
        labels: what a drawing calls each row; left out: "rank 0", "rank 1" and so on.
    """

    title: str
    rows: tuple[tuple[Span, ...], ...]
    memory: tuple[tuple[tuple[float, float], ...], ...] = ()
    unit: str = ""
    labels: tuple[str, ...] = ()

    @property
    def makespan(self) -> float:
        """From the first entry's start to the last one's end."""
        return max((row[-1].end for row in self.rows if row), default=0.0)

    def busy(self, rank: int) -> float:
        """Time that a rank's entries take."""
        return sum(span.end - span.start for span in self.rows[rank])

    def bubble(self, rank: int) -> float:
        """Time that a rank is in no entry."""
        return self.makespan - self.busy(rank)

    def comm(self, rank: int) -> float:
        """Time that a rank's expert exchanges were under way."""
        return sum(span.comm for span in self.rows[rank])

    def exposed(self, rank: int) -> float:
        """Of it, what the rank stood still for."""
        return sum(span.exposed for span in self.rows[rank])

    def peak_memory(self, rank: int) -> float:
        """Most memory of live microbatches at once."""
        return max((live for _, live in self.memory[rank]), default=0.0) if self.memory else 0.0

    @property
    def display_unit(self) -> tuple[float, str]:
        """What to multiply times by for a reader, and the unit that they are then in."""
        return (1000.0, "ms") if self.unit == "s" and self.makespan < 1 else (1.0, self.unit)
