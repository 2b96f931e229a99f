"""A plan: all that a run on a cluster comes to, before anything of it exists.

    config, cluster -> layout -> program -> step -> whole run        time
                              -> memory of every pipeline rank       does it fit
                              -> traffic of every pipeline rank      over which links
    all of it in three worlds, and each input figure moved alone     how far to trust it

Nothing is measured here and no torch is needed: a plan is arithmetic over what a cluster file says.
"""

from dataclasses import dataclass

from moe_runtime.config.counts import ParameterCounts, count_parameters
from moe_runtime.config.derive import tokens_per_step
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import WORLDS, World
from moe_runtime.planner.reckon.exchange import Spread, uniform_spread
from moe_runtime.planner.reckon.machine import GIGA, Machine
from moe_runtime.planner.reckon.memory import Memory, rank_memory
from moe_runtime.planner.reckon.room import check_room
from moe_runtime.planner.reckon.sensitivity import Moved, sensitivity
from moe_runtime.planner.reckon.step import Step, reckon_step
from moe_runtime.planner.reckon.token_flops import TokenParts, token_parts
from moe_runtime.planner.reckon.traffic import StepTraffic
from moe_runtime.planner.reckon.whole_run import WholeRun, whole_run
from moe_runtime.schedule.action import Program


@dataclass(frozen=True)
class Reckoned:
    """Time in one world."""

    step: Step
    run: WholeRun
    tokens_per_s_per_gpu: float


@dataclass(frozen=True)
class Plan:
    """A run on a cluster.

    Args:
        world: that all figures are of but those of `worlds`.
        imbalance: rows that the fullest rank's experts get, over the mean, as assumed.
        worlds: the times with all figures at the slow end, central, and all at the fast end.
        memory, traffic: of each pipeline rank; bytes, those of traffic for a step.
        sensitivity: the largest first; empty if it was not asked for.
    """

    config: RunConfig
    cluster: Cluster
    layout: ResolvedLayout
    world: World
    imbalance: float
    counts: ParameterCounts
    flops: TokenParts
    worlds: dict[World, Reckoned]
    memory: tuple[Memory, ...]
    traffic: tuple[StepTraffic, ...]
    sensitivity: tuple[Moved, ...]

    @property
    def here(self) -> Reckoned:
        """The times of its own world."""
        return self.worlds[self.world]

    @property
    def memory_limit(self) -> float:
        """Bytes of an accelerator."""
        return self.cluster.accelerator.memory_gb * GIGA

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def misfit(self) -> str | None:
        """Why the run cannot be on the cluster, in one line; None if it can."""
        needed = self.memory[self.fullest].total
        if needed <= self.memory_limit:
            return None
        return (
            f"{self.config.name} does not fit on {self.cluster.name}: pipeline rank {self.fullest} needs "
            f"{needed / GIGA:.2f} GB, expected at most the {self.memory_limit / GIGA:.2f} GB of "
            f"{self.cluster.accelerator.name}; raise layout.pp or layout.ep, or set recompute"
        )


def plan(
    config: RunConfig,
    cluster: Cluster,
    world: World = "central",
    *,
    imbalance: float = 1.0,
    spread: Spread | None = None,
    with_sensitivity: bool = True,
) -> Plan:
    """Reckon a run.

    Args:
        imbalance: rows that the fullest rank's experts get, over the mean.
        spread: places that a token reaches, measured; None: those of a router that prefers nothing.
        with_sensitivity: move each figure alone; some forty more steps.

    Raises:
        ConfigError: the layout contradicts itself, no program keeps to layout.max_live, or the cluster's file
            does not know the run's precision.
    """
    _check_precision(config, cluster)
    check_room(config, cluster, config.layout.pp * config.layout.dp)
    layout = check_layout(config)
    if spread is None and layout.ep > 1:  # drawn once, not for each of some fifty steps
        spread = uniform_spread(
            config.model, layout.ep, Machine(config, layout, cluster, world).ranks_per_node
        )

    def machine(where: Cluster, at: World) -> Machine:
        return Machine(config, layout, where, at, spread)

    worlds: dict[World, Reckoned] = {}
    program: Program | None = None
    for each in WORLDS:
        worlds[each] = _reckoned(machine(cluster, each), program, imbalance)
        program = worlds[each].step.program
    assert program is not None, "no world"

    def rate(moved: Cluster) -> float:
        return _rate(machine(moved, "central"), reckon_step(machine(moved, "central"), program, imbalance))

    ranks = range(layout.pp)
    return Plan(
        config=config,
        cluster=cluster,
        layout=layout,
        world=world,
        imbalance=imbalance,
        counts=count_parameters(config.model),
        flops=token_parts(config.model, config.batch.seq_len),
        worlds=worlds,
        memory=tuple(rank_memory(config, layout, program, rank, imbalance) for rank in ranks),
        traffic=tuple(machine(cluster, world).step_traffic(rank) for rank in ranks),
        sensitivity=tuple(sensitivity(cluster, rate)) if with_sensitivity else (),
    )


def _check_precision(config: RunConfig, cluster: Cluster) -> None:
    known = ["bf16", "fp8", *(["fp32"] if cluster.accelerator.peak_tflops.fp32 else [])]
    if config.precision not in known:
        raise ConfigError(
            f"precision: expected one that {cluster.name} has a peak for ({', '.join(known)}), "
            f"got {config.precision}; set precision=bf16"
        )


def _reckoned(machine: Machine, program: Program | None, imbalance: float) -> Reckoned:
    step = reckon_step(machine, program, imbalance)
    return Reckoned(step, whole_run(machine, step, imbalance), _rate(machine, step))


def _rate(machine: Machine, step: Step) -> float:
    """Tokens a second and GPU in a step of the full batch."""
    return tokens_per_step(machine.config) / step.seconds / machine.layout.world_size
