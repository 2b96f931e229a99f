"""Step times of thousands of layouts: a bound for each, a simulation for those that matter.

What layouts share is reckoned once: the kernels and lists of phases of one (ep, size of a microbatch,
recompute), the program of one (schedule, pp, microbatches, chunks) and its counts, the update of one
(placement, ep, ZeRO stage, moments). A bound is then some hundred multiplications; a simulation walks the
whole program.
"""

from collections.abc import Hashable

from moe_runtime.config.schema import RecomputeConfig, RunConfig
from moe_runtime.planner.costs import Costs
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.digest import Digest, digest
from moe_runtime.planner.reckon.exchange import Spread, uniform_spread
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.space import Frame
from moe_runtime.planner.reckon.stage_time import StageTimes, Timed
from moe_runtime.planner.reckon.update_time import update_time
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.builders import build
from moe_runtime.schedule.passes import unpair


class LayoutTimes:
    """Seconds of steps.

    Args:
        world, imbalance: as in `plan`.
    """

    def __init__(self, cluster: Cluster, world: World = "central", imbalance: float = 1.0) -> None:
        self._cluster, self._world, self._imbalance = cluster, world, imbalance
        self._digests: dict[Hashable, Digest] = {}
        self._spreads: dict[Hashable, Spread] = {}
        self._timed: dict[Hashable, Timed] = {}
        self._costs: dict[Hashable, Costs] = {}
        self._updates: dict[Hashable, float] = {}
        self._simulated: dict[Hashable, float] = {}

    @property
    def num_simulated(self) -> int:
        """Simulations so far."""
        return len(self._simulated)

    def digest(self, frame: Frame) -> Digest:
        """The program of a layout in counts."""
        key = _program_key(frame)
        if key not in self._digests:
            self._digests[key] = digest(program_of(frame))
        return self._digests[key]

    def at_least(self, frame: Frame, recompute: RecomputeConfig, moments: str) -> float:
        """What no simulation of the step can undercut."""
        bound = self.digest(frame).lower_bound(self._costs_of(frame, recompute))
        return bound + self._update(frame, recompute, moments)

    def simulated(self, frame: Frame, recompute: RecomputeConfig, moments: str) -> float:
        """The step, as `reckon_step` has it."""
        key = (*_program_key(frame), *_stage_key(frame, recompute))
        if key not in self._simulated:
            costs = self._costs_of(frame, recompute)
            self._simulated[key] = simulate(program_of(frame), costs).makespan
        return self._simulated[key] + self._update(frame, recompute, moments)

    def _costs_of(self, frame: Frame, recompute: RecomputeConfig) -> Costs:
        key = (*_program_key(frame), *_stage_key(frame, recompute))
        if key not in self._costs:
            machine = self._machine(frame.with_choices(recompute, frame.config.optim.moments), frame)
            shared = _stage_key(frame, recompute)
            if shared not in self._timed:
                self._timed[shared] = Timed(machine, self._imbalance)
            times = StageTimes(machine, self._imbalance, self._timed[shared])
            self._costs[key] = times.costs(self.digest(frame).sample)
        return self._costs[key]

    def _update(self, frame: Frame, recompute: RecomputeConfig, moments: str) -> float:
        layout = frame.layout
        key = (layout.placement, layout.dp, layout.ep, frame.config.layout.zero_stage, moments)
        if key not in self._updates:
            machine = self._machine(frame.with_choices(recompute, moments), frame)
            self._updates[key] = update_time(machine).total
        return self._updates[key]

    def _machine(self, config: RunConfig, frame: Frame) -> Machine:
        machine = Machine(config, frame.layout, self._cluster, self._world)
        if frame.layout.ep == 1:
            return machine
        key = (frame.layout.ep, machine.ranks_per_node)
        if key not in self._spreads:
            self._spreads[key] = uniform_spread(config.model, *key)
        return Machine(config, frame.layout, self._cluster, self._world, self._spreads[key])


def program_of(frame: Frame) -> Program:
    """What the runtime executes, transfers left out."""
    wanted, layout = frame.config.layout, frame.layout
    program = build(wanted.schedule, layout.pp, layout.num_microbatches, wanted.chunks)
    return program if wanted.overlap else unpair(program)


def _program_key(frame: Frame) -> tuple[Hashable, ...]:
    layout = frame.layout
    return layout.schedule, layout.pp, layout.num_microbatches, frame.config.layout.chunks


def _stage_key(frame: Frame, recompute: RecomputeConfig) -> tuple[Hashable, ...]:
    return frame.layout.ep, frame.config.batch.micro_batch_size, recompute
