"""A layout that has been checked, with all that the rest of the runtime asks of it.

Decided before any process starts; `fit` has the rules.
"""

from dataclasses import dataclass

from moe_runtime.config.axes import (
    Dispatcher,
    Schedule,
    admissible_size,
    batch_grid,
    resolve_dispatcher,
    resolve_schedule,
)
from moe_runtime.config.fit import layout_findings
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.split import split_layers
from moe_runtime.config.stages import Placement, num_stages, stage_ranks
from moe_runtime.errors import ConfigError


@dataclass(frozen=True)
class ResolvedLayout:
    """A layout that has been checked, with everything that `auto` and `null` stood for.

    Args:
        schedule: `auto` and `searched` name the program that is chosen when costs are known.
        placement: `placement[direction][stage]` is the pipeline rank that holds the stage.
        batch_quantum: admissible batch sizes are multiples of this many sequences ...
        smallest_batch: ... and not smaller than this.
        start_batch_size: sequences of the first step; the ramp's start, made admissible.
        num_microbatches: microbatches of one lane in a step after the ramp, both directions together.
        num_microbatches_start: the same in the first step.
        layers: the layers of each stage, in order of stage.
        taken_over: (steps, tokens) that the run had done when it took up a checkpoint under this layout.
    """

    pp: int
    dp: int
    ep: int
    schedule: Schedule
    dispatcher: Dispatcher
    world_size: int
    batch_quantum: int
    smallest_batch: int
    start_batch_size: int
    num_microbatches: int
    num_microbatches_start: int
    placement: Placement
    layers: tuple[range, ...]
    taken_over: tuple[int, int] = (0, 0)

    @property
    def num_stages(self) -> int:
        """Stages of one direction."""
        return len(self.layers)


def check_layout(config: RunConfig, world_size: int | None = None) -> ResolvedLayout:
    """Resolves the layout of a run, or says everything that is wrong with it.

    Args:
        config: the run.
        world_size: processes that there will be; None when that is for the layout to say.

    Raises:
        ConfigError: one line for each mistake.
    """
    model, layout, batch = config.model, config.layout, config.batch
    found = layout_findings(model, layout, batch, world_size)
    if found:
        raise ConfigError("\n".join(f"{finding.key}: {finding.text}" for finding in found))
    schedule = resolve_schedule(layout)
    quantum, smallest = batch_grid(layout, batch)
    start = admissible_size(batch, quantum, smallest, tokens=0)
    lane = layout.dp * batch.micro_batch_size
    stages = num_stages(layout, model.num_layers)
    counts = layout.layers_per_stage or split_layers(model, stages)
    return ResolvedLayout(
        pp=layout.pp,
        dp=layout.dp,
        ep=layout.ep,
        schedule=schedule,
        dispatcher=resolve_dispatcher(layout),
        world_size=layout.pp * layout.dp,
        batch_quantum=quantum,
        smallest_batch=smallest,
        start_batch_size=start,
        num_microbatches=batch.global_batch_size // lane,
        num_microbatches_start=start // lane,
        placement=stage_ranks(layout, model.num_layers),
        layers=tuple(range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(stages)),
    )
