"""What one phase makes and drops while it runs: the most of any, beside what microbatches keep.

Three phases can be the fullest. Each list is what is alive together at its widest point, with what is kept
(`activations.py`) left out:

    experts     backward: gradient of outputs, of factors, of rows, and the product or casts for weights
    attention   backward: queries, keys and values if made again, their gradients before and after parting
    head        logits of one chunk of tokens, twice while they become probabilities

It is an estimate to a phase, not tensor by tensor: kernels have temporaries of their own.
"""

from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.casts import columns, tiles
from moe_runtime.planner.reckon.kept import Keeping, padded_rows
from moe_runtime.planner.reckon.kernels import Shape
from moe_runtime.planner.reckon.parts import StageParts
from moe_runtime.planner.reckon.states import ITEM

CHUNK_TOKENS = 1024  # of the head, as `model/loss.py`
# Gradients of the stream that meet in a block: what came in, what its branches give, their sum.
STREAMS = 3


def phase_bytes(config: RunConfig, shape: Shape, keeping: Keeping, parts: StageParts) -> float:
    """The widest phase of a stage."""
    model, item = config.model, ITEM[config.precision]
    stream = STREAMS * shape.tokens * model.hidden_size * item
    widest = [_attention(config, shape, keeping) + stream]
    if parts.dense:
        widest.append(_gated(config, "ffn", shape.tokens, shape.tokens, model.ffn_size) + stream)
    if parts.moe or parts.mtp:
        rows = _gated(config, "moe.experts", shape.rows, padded_rows(shape), model.expert_ffn_size)
        widest.append(rows + stream)
    if parts.head:
        chunk = min(CHUNK_TOKENS, shape.tokens) * model.vocab_size
        widest.append(2.0 * chunk * max(4, item))
    return max(widest)


def _gated(config: RunConfig, part: str, rows: float, padded: float, width: int) -> float:
    """Backward of gate, up and down."""
    hidden, item = config.model.hidden_size, ITEM[config.precision]
    if config.precision == "fp8" and config.fp8.multiplies(part):
        given, made = tiles(hidden), item * hidden
        return rows * (given + made) + padded * columns(2 * hidden + 2 * width)
    return rows * item * (2 * hidden + 3 * width)


def _attention(config: RunConfig, shape: Shape, keeping: Keeping) -> float:
    """Backward of attention and of what makes its operands."""
    model = config.model
    item = keeping.attention_bytes or ITEM[config.precision]
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    wide = max(qk, v) if keeping.pads_value else v
    operands = (2 * qk + wide) * item
    parted = (qk + model.qk_nope_head_dim + v) * ITEM[config.precision]
    again = operands if config.recompute.mla_up else 0
    return float(shape.tokens * model.num_heads * (operands + parted + again + 2 * wide * item))
