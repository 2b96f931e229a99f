"""The kernels of what is no block: embedding, head with its loss, the way into an MTP module, and joints.

The head's products are BF16, and so is an MTP module's projection. A large head keeps no logits: its backward
makes them again, and its weight gradient is made there and then, so these products stand in the backward for
inputs. A small one makes all its gradients in the forward, where the logits are at hand.

Ref: DSV3 §2.2, (21), (24); §3.3.1 for what stays high.
"""

from moe_runtime.config.schema import ModelConfig
from moe_runtime.planner.reckon.kernels import BF16, Move, Phases, Product, Shape, of_input, of_weight

FP32 = 4
KEEP_BYTES = 64 * 2**20  # heads up to this many bytes of FP32 make their gradients in the forward


def embed(model: ModelConfig, shape: Shape) -> Phases:
    """Rows of the table read and written; their gradients added to the table's, in FP32."""
    width = shape.tokens * model.hidden_size
    back = Move("embedding backward", width * (BF16 + 2 * FP32))
    return Phases((Move("embedding", 2 * BF16 * width),), (back,), ())


def merge(model: ModelConfig, shape: Shape) -> Phases:
    """What the experts of the last block put out, added to the stream; backward nothing moves."""
    return Phases((Move("merge", 3 * BF16 * shape.tokens * model.hidden_size),), (), ())


def final_norm(model: ModelConfig, shape: Shape) -> Phases:
    """The norm before the head."""
    width = BF16 * shape.tokens * model.hidden_size
    return Phases((Move("norm", 2 * width),), (Move("norm backward", 4 * width),), ())


def loss(model: ModelConfig, shape: Shape) -> Phases:
    """Logits and their cross-entropy; with a large head forward once and in the backward again.

    A pass over logits is FP32: made from the product's BF16, its maximum, less that, exponentials, their sum.
    """
    logits = Product("head", shape.tokens, model.hidden_size, model.vocab_size, fp8=False)
    one = FP32 * shape.tokens * model.vocab_size
    made = Move("logits", 1.5 * one)
    softmax = Move("exponentials", 6 * one)
    back = (Move("gradients of logits", 1.5 * one), of_input(logits), of_weight(logits))
    if model.vocab_size * model.hidden_size * FP32 <= KEEP_BYTES:
        return Phases((logits, made, softmax, *back), (), ())
    return Phases((logits, made, softmax), (logits, made, softmax, *back), ())


def mtp_in(model: ModelConfig, shape: Shape) -> Phases:
    """Embedding and stream, each normed, side by side through one projection. Ref: DSV3 (21)."""
    hidden = model.hidden_size
    width = BF16 * shape.tokens * hidden
    joint = Product("mtp projection", shape.tokens, 2 * hidden, hidden, fp8=False)
    forward = (Move("embedding", 2 * width), Move("two norms", 4 * width), joint)
    back = (of_input(joint), Move("two norms backward", 8 * width), *embed(model, shape).input_grad)
    return Phases(forward, back, (of_weight(joint),))
