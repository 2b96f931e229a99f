"""Weights in 128 x 128 blocks: the laws of the tile quantiser, with the amax of a block. Ref: DSV3 §3.3.2."""

import math

import torch
from moe_comm.wire.formats import E4M3, FP32_INFINITY, FP32_MAGNITUDE, FP32_MANTISSA_BITS
from moe_comm.wire.tile import FLOOR, dequantise_tiles
from torch import Tensor, nn

from moe_runtime.fp8.tiled import TILE, Blocks, num_tiles

_OVER_MAX_MANTISSA = 0x1FFFFF  # carries into the exponent exactly when m > 1.75 = 448 / 2^8


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
    is_poisoned = amax_bits >= FP32_INFINITY
    floored = amax_bits.view(torch.float32).clamp(min=FLOOR).view(torch.int32)
    exponents = (floored + _OVER_MAX_MANTISSA).bitwise_right_shift_(FP32_MANTISSA_BITS).sub_(8)
    scales = exponents.bitwise_left_shift(FP32_MANTISSA_BITS).view(torch.float32)
    inverses = (254 - exponents).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
    scaled = values * _spread(inverses, columns)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    if is_poisoned.any():
        codes.masked_fill_(_spread(is_poisoned, columns), E4M3.nan_code)
    return codes, scales.masked_fill_(is_poisoned, torch.nan)


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
