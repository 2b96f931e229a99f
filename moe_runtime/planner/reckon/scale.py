"""The same run on fewer and on more accelerators: dp halved and doubled, everything else as it is.

The global batch stays, so every doubling leaves a lane half the microbatches, and the pipeline fills and
empties for less work; where they no longer fill it, or lanes cannot share the batch, the layout is not legal
and the row ends. What another layout would do there is for `search_layouts`.
"""

from dataclasses import dataclass

from moe_runtime.config.fit import layout_findings
from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import LayoutConfig, RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.exchange import uniform_spread
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.step import reckon_step
from moe_runtime.planner.reckon.whole_run import WholeRun, whole_run

DOUBLINGS = range(-4, 6)
HOURS_A_DAY = 24.0


@dataclass(frozen=True)
class AtScale:
    """The run on so many accelerators."""

    accelerators: int
    step_s: float
    run: WholeRun

    @property
    def days(self) -> float:
        """Wall time, failures included."""
        return self.run.gpu_hours_with_failures / self.accelerators / HOURS_A_DAY


def at_scales(
    config: RunConfig, cluster: Cluster, world: World = "central", imbalance: float = 1.0
) -> list[AtScale]:
    """The sizes at which the layout is legal, the smallest first."""
    found = []
    for power in DOUBLINGS:
        dp = config.layout.dp * 2.0**power
        if dp != int(dp) or dp < 1:
            continue
        wanted = LayoutConfig(**config.layout.model_dump() | {"dp": int(dp)})
        if layout_findings(config.model, wanted, config.batch):
            continue
        parts = {name: getattr(config, name) for name in RunConfig.model_fields}
        run = RunConfig(**parts | {"layout": wanted})
        layout = check_layout(run)
        machine = Machine(run, layout, cluster, world)
        if layout.ep > 1:
            spread = uniform_spread(run.model, layout.ep, machine.ranks_per_node)
            machine = Machine(run, layout, cluster, world, spread)
        step = reckon_step(machine, imbalance=imbalance)
        found.append(AtScale(layout.world_size, step.seconds, whole_run(machine, step, imbalance)))
    return found
