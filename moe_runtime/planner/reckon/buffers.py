"""What lies ready for messages: rows on their way to experts and back, streams between stages.

    alltoall   rows packed by destination, and room for those that arrive; each as many records as rows
    two_hop    records to nodes and those that cross, records to ranks and those that end here; on the way out
               these twice, for they are joined from the chunks that they came in
    local      nothing: rows are gathered straight from tokens

One exchange at a time, or two where a forward and a backward are interleaved (`schedule/interleave.py` starts
the second before it waits for the first). The ways back carry what is summed, in BF16 also under FP8.
"""

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.exchange import uniform_spread
from moe_runtime.planner.reckon.kernels import Shape
from moe_runtime.planner.reckon.states import ITEM
from moe_runtime.planner.reckon.wire import Kind, dispatcher_kind, row_format
from moe_runtime.schedule.action import Overlap, Program

RANKS_PER_NODE = 8  # where the layout does not say


def dispatcher_bytes(
    config: RunConfig, layout: ResolvedLayout, program: Program, rank: int, shape: Shape
) -> float:
    """Buffers of the exchanges under way at the fullest moment."""
    model, per_node = config.model, config.layout.ranks_per_node or RANKS_PER_NODE
    kind = dispatcher_kind(model, layout.dispatcher, layout.ep, per_node)
    if kind is None or model.num_layers + model.mtp_depth == model.num_dense_layers:
        return 0.0
    rows = row_format(config, kind)
    out, back = _records(config, layout.ep, per_node, kind, shape)
    widest = max(out * rows.record("dispatch").size, back * rows.record("dispatch_backward").size)
    return _at_once(program, rank) * widest


def _at_once(program: Program, rank: int) -> int:
    return 2 if any(isinstance(entry, Overlap) for entry in program.rows[rank]) else 1


def _records(config: RunConfig, ep: int, per_node: int, kind: Kind, shape: Shape) -> tuple[float, float]:
    """Records of one exchange in all of its buffers: to experts, and back."""
    choices = shape.tokens * config.model.top_k
    if kind == "alltoall":
        return choices + shape.rows, choices + shape.rows
    spread, uneven = uniform_spread(config.model, ep, per_node), shape.rows / choices
    far, near = spread.nodes * shape.tokens, spread.ranks * shape.tokens
    back = (far + near) * (1 + uneven)
    return back + near * uneven, back


def boundary_bytes(config: RunConfig, tensors: int, shape: Shape) -> float:
    """Streams or their gradients, [sequences, seq_len, hidden] each, that are coming or going."""
    return float(tensors * shape.tokens * config.model.hidden_size * ITEM[config.precision])
