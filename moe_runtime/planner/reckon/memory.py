"""Memory of each pipeline rank, by kind, over the program that it will run.

    states       weights, gradients, masters, moments, weight_casts          (`states.py`)
    activations  at the row's fullest moment, stage by stage                 (`activations.py`, `live.py`)
    buffers      exchanges and streams under way                             (`buffers.py`)
    allowance    for what nobody counts: fragments, the driver, libraries

Between the last backward and the update activations are gone and buckets of gradients are there; the larger
of the two moments counts. Bytes are bytes; whoever prints them says GB (10^9) or GiB (2^30): published
figures differ by 7% for that reason alone.

Experts' rows: a rank gets as many rows as it sends, times `imbalance`. Nothing bounds it but the router.
"""

from dataclasses import asdict, dataclass, replace

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.activations import Activations
from moe_runtime.planner.reckon.buffers import boundary_bytes, dispatcher_bytes
from moe_runtime.planner.reckon.kept import CPU, CUDA, Keeping, Kept, Live, live
from moe_runtime.planner.reckon.kernels import Shape
from moe_runtime.planner.reckon.live import fullest
from moe_runtime.planner.reckon.parts import StageParts, stage_parts
from moe_runtime.planner.reckon.states import rank_states
from moe_runtime.schedule.action import Program

# Rows of the fullest rank over their mean, unless a caller says otherwise: a balanced router.
IMBALANCE = 1.0
# A margin of ours, no measurement: of everything else.
ALLOWANCE = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank at its fullest moment.

    Args:
        activations: of all microbatches then alive.
        comm_buffers: exchanges with experts, and streams between stages.
        at_update: instead of the two above, between the last backward and the update.
        allowance: the margin.
        microbatches: alive at that moment, by stage.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    activations: float
    weight_casts: float
    comm_buffers: float
    allowance: float
    at_update: float
    microbatches: dict[int, int]

    @property
    def states(self) -> float:
        """What is there whatever runs."""
        return self.weights + self.gradients + self.masters + self.moments + self.weight_casts

    @property
    def total(self) -> float:
        """The larger of the two moments, with the margin."""
        return self.states + max(self.activations + self.comm_buffers, self.at_update) + self.allowance

    def by_kind(self) -> dict[str, float]:
        """Bytes by name of those kinds that are there when the program is at its fullest."""
        others = ("at_update", "microbatches")
        return {name: value for name, value in asdict(self).items() if name not in others}


def rank_memory(
    config: RunConfig,
    layout: ResolvedLayout,
    program: Program,
    rank: int,
    imbalance: float = IMBALANCE,
    allowance: float = ALLOWANCE,
    keeping: Keeping | None = None,
) -> Memory:
    """What a pipeline rank needs; the same in all its lanes, but for the rows of their experts.

    Args:
        program: with or without transfers.
        rank: pipeline rank.
        imbalance: rows that arrive at the rank's experts over those that it sends.
        allowance: margin, as a share of all the rest.
        keeping: the device; None: that of the config, CUDA for `auto`.
    """
    keeping = keeping or (CPU if config.device == "cpu" else CUDA)
    shape = run_shape(config, layout, imbalance)
    states = rank_states(config, layout, rank)
    peak = fullest(program, rank, stage_live(config, layout, shape, keeping))
    found = Memory(
        weights=states.weights,
        gradients=states.gradients,
        masters=states.masters,
        moments=states.moments,
        activations=peak.nbytes,
        weight_casts=states.weight_casts,
        comm_buffers=dispatcher_bytes(config, layout, program, rank, shape)
        + boundary_bytes(config, peak.boundary, shape),
        allowance=0.0,
        at_update=states.at_update,
        microbatches=peak.microbatches,
    )
    return replace(found, allowance=allowance * found.total)


def run_shape(config: RunConfig, layout: ResolvedLayout, imbalance: float = IMBALANCE) -> Shape:
    """What one microbatch of a lane gives a block to do."""
    tokens = config.batch.seq_len * config.batch.micro_batch_size
    return Shape(
        tokens=tokens,
        seq_len=config.batch.seq_len,
        rows=tokens * config.model.top_k * imbalance,
        local_experts=config.model.num_experts // layout.ep,
        fp8=config.precision == "fp8",
    )


def stage_live(config: RunConfig, layout: ResolvedLayout, shape: Shape, keeping: Keeping) -> list[Live]:
    """Bytes of one microbatch in each stage."""
    stages = zip(layout.layers, stage_parts(config.model, layout), strict=True)
    return [live(stage_tensors(config, layers, parts, keeping), shape) for layers, parts in stages]


def stage_tensors(config: RunConfig, layers: range, parts: StageParts, keeping: Keeping) -> list[Kept]:
    """What one microbatch keeps in a stage."""
    kept = Activations(config, keeping)
    found: list[Kept] = []
    for number in layers:
        found += kept.block(f"layers.{number}", number >= config.model.num_dense_layers)
    if parts.head:
        found += kept.loss(hidden_is_read=parts.mtp > 0)
    for depth in range(parts.mtp):
        found += kept.mtp(depth)
    return found


def model_memory(
    config: RunConfig, layout: ResolvedLayout, program: Program, imbalance: float = IMBALANCE
) -> tuple[Memory, ...]:
    """Of every pipeline rank, in order."""
    return tuple(rank_memory(config, layout, program, rank, imbalance) for rank in range(layout.pp))
