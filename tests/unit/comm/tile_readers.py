"""Experts that read carried tiles, for tests: they decode them, and so give what the decoding path gives."""

from typing import Any

import torch
from moe_comm.wire.carried import decoded, tiles_of
from torch import Tensor


class RowReader(torch.autograd.Function):
    """Decodes the rows on their way into the experts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return decoded(rows).clone()

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> Tensor:
        return d_rows


class GradReader(torch.autograd.Function):
    """Decodes the gradient of the experts' outputs, and notes whether there were tiles to decode."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(tiles_of(d_outputs) is not None)
        return decoded(d_outputs), None


class TileReader:
    """Experts of one matrix each, that decode what carries tiles.

    Attributes:
        matrices: [experts, hidden, hidden], all alike on every rank.
        rows_had_tiles, grads_had_tiles: of each call.
    """

    def __init__(self, num_experts: int, first: int, count: int, hidden: int, dtype: torch.dtype) -> None:
        drawn = torch.randn(num_experts, hidden, hidden, generator=torch.Generator().manual_seed(3))
        self.matrices = (drawn[first : first + count] / hidden**0.5).to(dtype).requires_grad_()
        self.rows_had_tiles: list[bool] = []
        self.grads_had_tiles: list[bool] = []

    def __call__(self, rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> Tensor:
        self.rows_had_tiles.append(tiles_of(rows) is not None)
        blocks = zip(RowReader.apply(rows).split(row_counts.tolist()), self.matrices, strict=True)
        outputs = torch.cat([torch.tanh(block @ matrix) for block, matrix in blocks])
        return GradReader.apply(outputs * row_weights[:, None].to(outputs.dtype), self.grads_had_tiles)
