"""Cross-entropy of the output head that never holds all logits.

Tokens are taken in chunks: a chunk's logits are made, used and dropped. Backward needs them again. Two
ways, chosen by the size of the head:

*Gradients at once.* With the logits at hand, forward also makes d_hidden and d_weight for a loss
gradient of 1; backward scales them. Three GEMMs instead of four, for one FP32 tensor shaped like the
head kept until backward.

*Logits again.* Forward keeps one number a token, the log of the sum of exponentials, and backward
multiplies each chunk again. For a large head (3.7 GB in FP32 for DeepSeek-V3's) this is the only way,
and beside such a model the fourth GEMM is below one percent.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_runtime.model.product import product, wide, write_product
from moe_runtime.model.weight_grad import deliver

CHUNK_TOKENS = 1024
KEEP_BYTES = 64 * 2**20  # a head gradient up to this size is made in forward and kept


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[tokens, vocab] in at least FP32, not rounded in between where products are made in FP32."""
    high = torch.promote_types(hidden.dtype, torch.float32)
    return torch.mm(hidden, head.t()).to(high)


def _to_gradient(logits: Tensor, lse: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Turn logits [tokens, vocab] into d_loss / d_logits for a mean over 1 / scale tokens, in place."""
    grad = logits.sub_(lse.unsqueeze(1)).exp_()
    grad.scatter_add_(1, targets.unsqueeze(1), grad.new_full((grad.shape[0], 1), -1.0))
    return grad.mul_(scale)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, keep: bool) -> Tensor:
        high = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.empty(hidden.shape[0], dtype=high, device=hidden.device)
        picked = torch.empty_like(lse)
        d_hidden = torch.empty_like(hidden) if keep else None
        d_head = torch.zeros_like(head, dtype=high) if keep else None
        wide_head = wide(head)
        for start in range(0, hidden.shape[0], chunk):
            span = slice(start, start + chunk)
            logits = _logits(wide(hidden[span]), wide_head)
            lse[span] = logits.logsumexp(dim=1)
            picked[span] = logits.gather(1, targets[span].unsqueeze(1)).squeeze(1)
            if d_hidden is not None and d_head is not None:
                grad = _to_gradient(logits, lse[span], targets[span], 1.0 / hidden.shape[0])
                _use(grad.to(wide_head.dtype), hidden[span], wide_head, d_hidden[span], d_head)
        ctx.head, ctx.chunk, ctx.keep = head, chunk, keep
        kept = (d_hidden, d_head) if keep else (hidden, targets, lse)
        ctx.save_for_backward(*kept)
        return (lse - picked).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.keep:
            d_hidden, d_head = ctx.saved_tensors
            d_hidden = d_hidden * d_loss.to(d_hidden.dtype)
        else:
            hidden, targets, lse = ctx.saved_tensors
            d_hidden, d_head = _again(hidden, ctx.head, targets, lse, ctx.chunk)
            d_hidden.mul_(d_loss.to(d_hidden.dtype))

        def write(out: Tensor, accumulate: bool) -> None:
            if accumulate:
                out.addcmul_(d_head, d_loss.to(d_head.dtype))
            else:
                torch.mul(d_head, d_loss, out=out)

        return d_hidden, deliver(ctx.head, write, deferrable=False, dtype=d_head.dtype), None, None, None


def _use(grad: Tensor, hidden: Tensor, head: Tensor, d_hidden: Tensor, d_head: Tensor) -> None:
    """Gradients of one chunk from those of its logits."""
    d_hidden.copy_(product(grad, head, d_hidden.dtype))
    write_product(d_head, grad.t(), hidden.to(grad.dtype), accumulate=True)


def _again(hidden: Tensor, head: Tensor, targets: Tensor, lse: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and head for a loss gradient of 1, with logits multiplied again."""
    d_hidden = torch.empty_like(hidden)
    d_head = torch.zeros_like(head, dtype=lse.dtype)
    wide_head = wide(head)
    for start in range(0, hidden.shape[0], chunk):
        span = slice(start, start + chunk)
        logits = _logits(wide(hidden[span]), wide_head)
        grad = _to_gradient(logits, lse[span], targets[span], 1.0 / hidden.shape[0])
        _use(grad.to(wide_head.dtype), hidden[span], wide_head, d_hidden[span], d_head)
    return d_hidden, d_head


def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK_TOKENS, keep: bool | None = None
) -> Tensor:
    """Mean cross-entropy of logits = hidden x head^T against the next tokens. Ref: DSV3 (24).

    Args:
        hidden: normed stream [..., hidden].
        head: [vocab, hidden].
        targets: int64, shaped as hidden without its last axis.
        chunk: tokens whose logits exist at one time.
        keep: make the gradients in forward; None: if something wants them and the head is small.

    Returns:
        Scalar in at least FP32: the sum over tokens divided by their number.
    """
    if keep is None:
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
        keep = wanted and 4 * head.numel() <= KEEP_BYTES
    flat = hidden.reshape(-1, hidden.shape[-1])
    out: Tensor = _HeadLoss.apply(flat, head, targets.reshape(-1), chunk, keep)
    return out
