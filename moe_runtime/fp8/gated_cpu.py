"""SwiGLU joined with its casts, on a CPU: the forms behind `cast.py`. All arithmetic is FP32."""

import torch
from torch import Tensor, nn

from moe_runtime.fp8.cast_cpu import Columns, chunks, quantise_rows, values_of
from moe_runtime.fp8.tiled import Groups, Tiles, num_tiles


class _Rows:
    """Tiles [rows, columns] in the making, some rows at a time."""

    def __init__(self, rows: int, columns: int) -> None:
        self._codes = torch.empty(rows, columns, dtype=torch.uint8)
        self._scales = torch.empty(rows, num_tiles(columns))

    def write(self, rows: slice, values: Tensor) -> None:
        tiles = quantise_rows(values)
        self._codes[rows], self._scales[rows] = tiles.codes, tiles.scales

    def done(self) -> Tiles:
        return Tiles(self._codes, self._scales)


def _product(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """silu(gate) x up (x weight) of float32 gate_up [rows, 2f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    made = nn.functional.silu(gate).mul_(up)
    return made if weights is None else made.mul_(weights.unsqueeze(1))


def _weights_of(row_weights: Tensor | None, rows: slice) -> Tensor | None:
    return None if row_weights is None else row_weights[rows].float()


def cast_gated(gate_up: Tensor, row_weights: Tensor | None) -> Tiles:
    """See `cast.cast_gated`."""
    rows, width = gate_up.shape
    made = _Rows(rows, width // 2)
    for chunk in chunks(Groups.one(rows, gate_up.device), width):
        weights = _weights_of(row_weights, chunk.rows)
        made.write(chunk.rows, _product(gate_up[chunk.rows].float(), weights))
    return made.done()


def cast_gated_tiles(gate_up: Tiles, row_weights: Tensor | None, groups: Groups) -> Tiles:
    """See `cast.cast_gated_tiles`."""
    columns = Columns(gate_up.shape[1] // 2, groups)
    for chunk in chunks(groups, gate_up.shape[1]):
        weights = _weights_of(row_weights, chunk.rows)
        columns.write(chunk.padded, _product(values_of(gate_up, chunk.rows), weights))
    return columns.done()


def gated_backward_cast(
    d_product: Tensor, gate_up: Tiles, row_weights: Tensor | None, groups: Groups
) -> tuple[Tiles, Tiles, Tensor | None]:
    """See `cast.gated_backward_cast`."""
    rows, width = gate_up.shape
    made, columns = _Rows(rows, width), Columns(width, groups)
    d_row_weights = None if row_weights is None else torch.empty(rows)
    parts = list(chunks(groups, width))
    scratch = torch.empty(max((part.rows.stop - part.rows.start for part in parts), default=0), width)
    for part in parts:
        gate, up = values_of(gate_up, part.rows).chunk(2, dim=-1)
        pull = d_product[part.rows].float()
        d_gate_up = scratch[: pull.shape[0]]
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=d_up)
        if row_weights is not None and d_row_weights is not None:
            d_row_weights[part.rows] = torch.mul(d_up, up, out=d_gate).mul_(pull).sum(dim=-1)
            pull = pull * row_weights[part.rows].float().unsqueeze(1)
        torch.mul(pull, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        d_up.mul_(pull)
        made.write(part.rows, d_gate_up)
        columns.write(part.padded, d_gate_up)
    return made.done(), columns.done(), d_row_weights
