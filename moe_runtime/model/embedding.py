"""Token embedding whose gradient is added row by row, always in the same order."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.model.weight_grad import deliver


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(tokens)
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor | None]:
        tokens = ctx.saved_tensors[0].reshape(-1)
        d_rows = d_out.reshape(-1, d_out.shape[-1])

        def write(out: Tensor, accumulate: bool) -> None:
            if not accumulate:
                out.zero_()
            rows = d_rows.to(out.dtype)
            if out.is_cuda:
                # Sorts the indices first; index_add_ would add in whatever order atomics settle.
                out.index_put_((tokens,), rows, accumulate=True)
            else:
                out.index_add_(0, tokens, rows)

        high = torch.promote_types(d_rows.dtype, torch.float32)
        return None, deliver(ctx.weight, write, deferrable=False, dtype=high)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [vocab, hidden] for int64 tokens [...]: [..., hidden]."""
    out: Tensor = _Embedding.apply(tokens, weight)
    return out


class Embedding(nn.Module):
    """The table of token vectors, `weight` [vocab, hidden]; shared with MTP. Ref: DSV3 §2.2."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 tokens [...] -> [..., hidden]."""
        return embedding(tokens, self.weight)
