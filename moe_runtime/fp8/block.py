"""Weights in 128 x 128 blocks: the laws of the tile quantiser, with the amax of a block. Ref: DSV3 §3.3.2."""

import math

import torch
from moe_comm.wire.formats import E4M3, FP32_MAGNITUDE
from moe_comm.wire.tile import dequantise_tiles
from torch import Tensor, nn

from moe_runtime.fp8.scales import E4M3_SCALES
from moe_runtime.fp8.tiled import TILE, Blocks, num_tiles


def cast_weight_on_cpu(weight: Tensor) -> Blocks:
    """See `cast.cast_weight`; one band of 128 rows of all experts after the other."""
    *experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(*experts, num_tiles(rows), num_tiles(columns))
    if weight.numel():
        for block in range(num_tiles(rows)):
            band = slice(block * TILE, (block + 1) * TILE)
            codes[..., band, :], scales[..., block, :] = _quantise_band(weight[..., band, :].float())
    return Blocks(codes, scales)


def _quantise_band(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of float32 values [..., up to 128, columns] and scales [..., blocks]."""
    columns = values.shape[-1]
    amax_bits = (values.view(torch.int32) & FP32_MAGNITUDE).amax(-2)
    amax_bits = nn.functional.pad(amax_bits, (0, num_tiles(columns) * TILE - columns))
    amax_bits = amax_bits.unflatten(-1, (num_tiles(columns), TILE)).amax(-1)
    made = E4M3_SCALES.of(amax_bits)
    scaled = values * _spread(made.inverses, columns)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    if made.is_poisoned.any():
        codes.masked_fill_(_spread(made.is_poisoned, columns), E4M3.nan_code)
    return codes, made.scales


def _spread(per_block: Tensor, columns: int) -> Tensor:
    """[..., blocks] to [..., 1, columns]."""
    return per_block.repeat_interleave(TILE, dim=-1)[..., :columns].unsqueeze(-2)


def decode_blocks_on_cpu(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Values [..., rows, columns] of `dtype`."""
    rows, columns = blocks.shape[-2:]
    per_row = blocks.scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    num_rows = math.prod(blocks.shape[:-1])
    values = dequantise_tiles(
        blocks.codes.reshape(num_rows, columns), per_row.reshape(num_rows, num_tiles(columns)), dtype
    )
    return values.view(blocks.shape)
