"""What lies ready for messages: rows on their way to experts and back, streams between stages.

    alltoall   rows packed by destination, and room for those that arrive; each as many records as rows
    two_hop    records to nodes, a chunk of the tokens at a time; records to ranks, all that arrive
    local      nothing: rows are gathered straight from tokens

One exchange at a time, or two where a forward and a backward are interleaved (`parallel/overlap.py` starts
the second before it waits for the first). The ways back carry what is summed, in BF16 also under FP8.
"""

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.exchange import uniform_spread
from moe_runtime.planner.reckon.kernels import Shape
from moe_runtime.planner.reckon.states import ITEM
from moe_runtime.schedule.action import Overlap, Program

CHUNKS = 4  # of a two-hop exchange, as the dispatcher's default
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
    if layout.dispatcher == "local" or not config.model.num_layers > config.model.num_dense_layers:
        return 0.0
    hidden = config.model.hidden_size
    record = hidden * max(wire_bytes(config), wire_bytes(config, back=True)) + WEIGHT
    at_once = 2 if any(isinstance(entry, Overlap) for entry in program.rows[rank]) else 1
    return at_once * record * _records(config, layout, shape)


def _records(config: RunConfig, layout: ResolvedLayout, shape: Shape) -> float:
    """Records of one exchange in both of its buffers."""
    choices = shape.tokens * config.model.top_k
    if layout.dispatcher == "alltoall":
        return choices + shape.rows
    spread = uniform_spread(config.model, layout.ep, config.layout.ranks_per_node or RANKS_PER_NODE)
    uneven = shape.rows / choices
    far = spread.nodes * shape.tokens * (1 + uneven) / CHUNKS
    return far + spread.ranks * shape.tokens * (uneven + uneven / CHUNKS)


RANKS_PER_NODE = 8


def boundary_bytes(config: RunConfig, tensors: int, shape: Shape) -> float:
    """Streams or their gradients, [sequences, seq_len, hidden] each, that are coming or going."""
    return float(tensors * shape.tokens * config.model.hidden_size * ITEM[config.precision])
