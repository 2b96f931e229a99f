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

from moe_runtime.model.product import wide, write_product
from moe_runtime.model.targets import token_ids
from moe_runtime.model.weight_grad import deliver

CHUNK_TOKENS = 1024
KEEP_BYTES = 64 * 2**20  # a head gradient up to this size is made in forward and kept


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """[tokens, vocab] in at least FP32, not rounded in between where products are made in FP32."""
    high = torch.promote_types(hidden.dtype, torch.float32)
    return torch.mm(wide(hidden), head.t()).to(high)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [tokens, vocab], less the largest of their row, into exponentials, in place.

    Returns:
        Sums of the rows, and the logs of the sums that no shift would have made; both [tokens].
    """
    top = logits.amax(dim=1)
    sums = logits.sub_(top.unsqueeze(1)).exp_().sum(dim=1)
    return sums, sums.log() + top


def _spread(
    scaled: Tensor,
    scales: Tensor,
    hidden: Tensor,
    targets: Tensor,
    head: Tensor,
    d_hidden: Tensor,
    d_head: Tensor | None,
) -> None:
    """Gradients of one chunk's hidden, and of head added up, from its probabilities.

    Args:
        scaled: probabilities times `scales` [chunk, vocab]; used up.
        scales: gradient of the loss by each token's loss [chunk].
        targets: ids, of tokens that are no targets too.
        head: as products want it (`wide`).
    """
    d_logits = scaled.scatter_add_(1, targets.unsqueeze(1), scales.neg().unsqueeze(1)).to(head.dtype)
    write_product(d_hidden, d_logits, head)
    if d_head is not None:
        write_product(d_head, d_logits.t(), hidden, accumulate=True)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, keep: bool) -> Tensor:
        tokens = hidden.shape[0]
        high = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.empty(tokens, dtype=high, device=hidden.device)
        picked = torch.empty_like(lse)
        d_hidden = torch.empty_like(hidden) if keep else None
        d_head = torch.zeros_like(head, dtype=high) if keep and ctx.needs_input_grad[1] else None
        wide_head, counts = wide(head), (targets >= 0).to(high)
        ids, scales = token_ids(targets), counts * (1.0 / max(1, tokens))
        for start in range(0, tokens, chunk):
            span = slice(start, start + chunk)
            logits = _logits(hidden[span], wide_head)
            picked[span] = logits.gather(1, ids[span].unsqueeze(1)).squeeze(1)
            sums, lse[span] = _exponentials(logits)
            if d_hidden is not None:
                scaled = logits.mul_((scales[span] / sums).unsqueeze(1))
                _spread(scaled, scales[span], hidden[span], ids[span], wide_head, d_hidden[span], d_head)
        ctx.head, ctx.chunk, ctx.keep = head, chunk, keep
        ctx.save_for_backward(*((d_hidden, d_head) if keep else (hidden, targets, lse)))
        return ((lse - picked) * counts).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        head, wants_head = ctx.head, ctx.needs_input_grad[1]
        if ctx.keep:
            made, d_head = ctx.saved_tensors
            d_hidden = made * d_loss.to(made.dtype)

            def add_to(out: Tensor) -> None:
                out.addcmul_(d_head, d_loss)
        else:
            hidden, targets, lse = ctx.saved_tensors
            d_hidden = torch.empty_like(hidden)

            def add_to(out: Tensor) -> None:
                _again(hidden, head, targets, lse, ctx.chunk, d_loss, d_hidden, out)

            if not wants_head:
                _again(hidden, head, targets, lse, ctx.chunk, d_loss, d_hidden, None)

        def write(out: Tensor, accumulate: bool) -> None:
            add_to(out if accumulate else out.zero_())

        # Not deferrable: where logits are made again, `write` makes d_hidden too.
        high = torch.promote_types(head.dtype, torch.float32)
        d_weight = deliver(head, write, deferrable=False, dtype=high) if wants_head else None
        return d_hidden, d_weight, None, None, None


def _again(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    lse: Tensor,
    chunk: int,
    d_loss: Tensor,
    d_hidden: Tensor,
    d_head: Tensor | None,
) -> None:
    """Gradients from logits made again, in one pass: d_hidden written, d_head added up."""
    wide_head, ids = wide(head), token_ids(targets)
    scales = (d_loss / hidden.shape[0]).to(lse.dtype) * (targets >= 0)
    for start in range(0, hidden.shape[0], chunk):
        span = slice(start, start + chunk)
        scaled = _logits(hidden[span], wide_head).sub_(lse[span].unsqueeze(1)).exp_()
        scaled.mul_(scales[span].unsqueeze(1))
        _spread(scaled, scales[span], hidden[span], ids[span], wide_head, d_hidden[span], d_head)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Cross-entropy of each token by itself, in nats: [tokens] in at least FP32; without a tape.

    Args:
        hidden: normed stream [tokens, hidden].
        head: [vocab, hidden].
        targets: int64 [tokens].
        chunk: tokens whose logits exist at one time.
    """
    wide_head, found = wide(head), []
    for start in range(0, hidden.shape[0], chunk):
        span = slice(start, start + chunk)
        logits = _logits(hidden[span], wide_head)
        picked = logits.gather(1, targets[span].unsqueeze(1)).squeeze(1)
        found.append(_exponentials(logits)[1] - picked)
    high = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=high)


def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK_TOKENS, keep: bool | None = None
) -> Tensor:
    """Mean cross-entropy of logits = hidden x head^T against the next tokens. Ref: DSV3 (24).

    Args:
        hidden: normed stream [..., hidden].
        head: [vocab, hidden].
        targets: int64, shaped as hidden without its last axis; the complement of an id counts 0.
        chunk: tokens whose logits exist at one time.
        keep: make the gradients in forward; None: if something wants them and the head is small.

    Returns:
        Scalar in at least FP32: the sum over targets divided by the number of all tokens.
    """
    if keep is None:
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
        keep = wanted and 4 * head.numel() <= KEEP_BYTES
    flat = hidden.reshape(-1, hidden.shape[-1])
    out: Tensor = _HeadLoss.apply(flat, head, targets.reshape(-1), chunk, keep)
    return out
