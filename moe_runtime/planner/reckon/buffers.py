"""What lies ready for messages: rows on their way to experts and back, streams between stages.

    alltoall   rows packed by destination, and room for those that arrive; each as many records as rows
    two_hop    records to nodes and those that cross, records to ranks and those that end here; on the way out
               these twice, for they are joined from the chunks that they came in
    local      nothing: rows are gathered straight from tokens

One exchange at a time, or two where a forward and a backward are interleaved (`parallel/overlap.py` starts
the second before it waits for the first). The ways back carry what is summed, in BF16 also under FP8.
"""

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.planner.reckon.exchange import uniform_spread
from moe_runtime.planner.reckon.kernels import Shape
from moe_runtime.planner.reckon.states import ITEM
from moe_runtime.schedule.action import Overlap, Program

RANKS_PER_NODE = 8  # where the layout does not say
WEIGHT = 4  # a gate weight beside a row
_WIRE = {"bf16": 2.0, "fp32": 4.0, "fp8": 1 + 4 / 128, "fp8_pow2": 1 + 1 / 128}


def wire_bytes(config: RunConfig, back: bool = False) -> float:
    """Bytes a value that rows travel with.

    Args:
        back: of combine and of the backward of dispatch.
    """
    wire = config.layout.wire
    if wire == "auto":
        tiles = config.precision == "fp8" and config.fp8.multiplies("moe.experts")
        wire = "fp8_pow2" if tiles and config.fp8.fprop == "fp8" else "auto"
    if back and wire in ("fp8", "fp8_pow2"):
        return _WIRE["bf16"]
    return _WIRE.get(wire, float(ITEM[config.precision]))


def dispatcher_bytes(
    config: RunConfig, layout: ResolvedLayout, program: Program, rank: int, shape: Shape
) -> float:
    """Buffers of the exchanges under way at the fullest moment."""
    model = config.model
    if layout.dispatcher == "local" or model.num_layers + model.mtp_depth == model.num_dense_layers:
        return 0.0
    out, back = _records(config, layout, shape)
    wires = (out, wire_bytes(config)), (back, wire_bytes(config, back=True))
    widest = max(records * (model.hidden_size * wire + WEIGHT) for records, wire in wires)
    return _at_once(program, rank) * widest


def _at_once(program: Program, rank: int) -> int:
    return 2 if any(isinstance(entry, Overlap) for entry in program.rows[rank]) else 1


def _records(config: RunConfig, layout: ResolvedLayout, shape: Shape) -> tuple[float, float]:
    """Records of one exchange in all of its buffers: to experts, and back."""
    model, per_node = config.model, config.layout.ranks_per_node or RANKS_PER_NODE
    choices = shape.tokens * model.top_k
    if not _goes_two_hops(model, layout, per_node):
        return choices + shape.rows, choices + shape.rows
    spread, uneven = uniform_spread(model, layout.ep, per_node), shape.rows / choices
    far, near = spread.nodes * shape.tokens, spread.ranks * shape.tokens
    back = (far + near) * (1 + uneven)
    return back + near * uneven, back


def _goes_two_hops(model: ModelConfig, layout: ResolvedLayout, per_node: int) -> bool:
    """What `auto` takes: two hops over several whole nodes of whole routing groups."""
    if layout.dispatcher != "auto":
        return layout.dispatcher == "two_hop"
    nodes, left = divmod(layout.ep, per_node)
    return nodes > 1 and not left and model.num_groups % nodes == 0


def boundary_bytes(config: RunConfig, tensors: int, shape: Shape) -> float:
    """Streams or their gradients, [sequences, seq_len, hidden] each, that are coming or going."""
    return float(tensors * shape.tokens * config.model.hidden_size * ITEM[config.precision])
