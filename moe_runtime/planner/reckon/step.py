"""One optimizer step on a clock: the run's own program simulated, then the update.

    step = pipeline (1F, 1B, 1W, 1F1B, and the bubble between them) + optimizer

The parts are named as ISCA 2025, Table 4 names them: 1F, 1B and 1W are forwards, backwards and weight
gradients that run by themselves, 1F1B overlapped pairs. They are means over pipeline ranks, each with what
it stood still for exchanges; so they and the bubble sum up to the pipeline's time.

Ref: Zhao et al. 2025 (arXiv 2505.09343), §5.1.2
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from moe_runtime.planner.choose import choose
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.stage_time import StageTimes
from moe_runtime.planner.reckon.states import BUCKET
from moe_runtime.planner.reckon.update_time import UpdateTime, update_time
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Timeline
from moe_runtime.schedule.action import Entry, Kind, Overlap, Program
from moe_runtime.schedule.passes import unpair

PHASES = ("1F", "1B", "1W", "1F1B", "bubble", "optimizer")
_NAMES = {
    Kind.FORWARD: "1F",
    Kind.BACKWARD: "1B",
    Kind.INPUT_GRAD: "1B",
    Kind.WEIGHT_GRAD: "1W",
}


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Args:
        program: that the run executes.
        times: of its stages.
        timeline: the program on the clock, seconds.
        update: what follows it.
    """

    program: Program
    times: StageTimes
    timeline: Timeline
    update: UpdateTime

    @property
    def seconds(self) -> float:
        """From the first forward to the last gathered weight."""
        return self.timeline.makespan + self.update.total

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds by name, in the mean over pipeline ranks; they sum to `seconds`."""
        ranks = range(self.program.num_ranks)
        rows = [self.phases_of(rank) for rank in ranks]
        return {name: sum(row[name] for row in rows) / len(rows) for name in PHASES}

    def phases_of(self, rank: int) -> dict[str, float]:
        """The same of one pipeline rank."""
        found = dict.fromkeys(PHASES, 0.0)
        for span in self.timeline.rows[rank]:
            found[_name(span.entry)] += span.end - span.start
        return found | {"bubble": self.timeline.bubble(rank), "optimizer": self.update.total}

    @property
    def bubble(self) -> float:
        """Seconds that a rank is in no entry, in the mean."""
        return self.phases["bubble"]

    @property
    def exposed(self) -> float:
        """Seconds that a rank stands still for exchanges or for messages that leave, in the mean."""
        ranks = range(self.program.num_ranks)
        return sum(map(self.timeline.exposed, ranks)) / len(ranks)

    @property
    def usual_pair(self) -> tuple[int, int] | None:
        """Stages of the forward and the backward that overlap most often; None if none do."""
        entries = [span.entry for row in self.timeline.rows for span in row]
        pairs = Counter(
            (one.forward.stage, one.backward.stage) for one in entries if isinstance(one, Overlap)
        )
        # Of equally many the one in the middle of the pipeline.
        middle = self.program.num_stages / 2
        return max(pairs, key=lambda pair: (pairs[pair], -abs(pair[0] - middle)), default=None)

    @property
    def num_pairs(self) -> float:
        """Overlapped pairs of a rank, in the mean."""
        entries = [span.entry for row in self.timeline.rows for span in row]
        return sum(isinstance(entry, Overlap) for entry in entries) / self.program.num_ranks


def run_program(machine: Machine, num_microbatches: int) -> Program:
    """The program that the runtime would execute.

    Raises:
        ConfigError: layout.costs cannot be read, or no program keeps to layout.max_live.
    """
    config = machine.config
    program = choose(config.model, config.layout, machine.layout, num_microbatches).program
    return program if config.layout.overlap else unpair(program)


def reckon_step(
    machine: Machine, program: Program | None = None, imbalance: float = 1.0, bucket: int = BUCKET
) -> Step:
    """A step after the batch ramp.

    Args:
        program: of this layout, if it is known; None: what `run_program` says.
        imbalance: rows that the fullest rank's experts get, over the mean.
        bucket: gradients in one message, as in `update_time`.
    """
    program = program or run_program(machine, machine.layout.num_microbatches)
    times = StageTimes(machine, imbalance)
    return Step(program, times, simulate(program, times.costs(program)), update_time(machine, bucket))


def _name(entry: Entry) -> str:
    return "1F1B" if isinstance(entry, Overlap) else _NAMES[entry.kind]
