"""Weights in 128 x 128 blocks: the laws of the tile quantiser, with the amax of a block. Ref: DSV3 §3.3.2."""

import torch
from moe_comm.wire.formats import E4M3, FP32_INFINITY, FP32_MAGNITUDE, FP32_MANTISSA_BITS
from moe_comm.wire.tile import FLOOR, dequantise_tiles
from torch import Tensor, nn

from moe_runtime.fp8.tiled import TILE, Blocks, num_tiles

_OVER_MAX_MANTISSA = 0x1FFFFF


def cast_weight_on_cpu(weight: Tensor) -> Blocks:
    """See `cast.cast_weight`."""
    *experts, rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(*experts, num_tiles(rows), num_tiles(columns))
    matrices = zip(
        weight.reshape(-1, rows, columns),
        codes.view(-1, rows, columns),
        scales.view(-1, num_tiles(rows), num_tiles(columns)),
        strict=True,
    )
    for matrix, its_codes, its_scales in matrices:
        for block in range(num_tiles(rows)):
            band = slice(block * TILE, (block + 1) * TILE)
            its_codes[band], its_scales[block] = _quantise_band(matrix[band].float())
    return Blocks(codes, scales)


def _quantise_band(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of float32 values [up to 128, columns] and one scale for each 128 columns."""
    columns = values.shape[1]
    amax_bits = (values.view(torch.int32) & FP32_MAGNITUDE).amax(0)
    room = num_tiles(columns) * TILE - columns
    amax_bits = nn.functional.pad(amax_bits, (0, room)).view(-1, TILE).amax(1)
    is_poisoned = amax_bits >= FP32_INFINITY
    floored = torch.maximum(amax_bits.view(torch.float32), torch.tensor(FLOOR)).view(torch.int32)
    exponents = (floored + _OVER_MAX_MANTISSA).bitwise_right_shift_(FP32_MANTISSA_BITS).sub_(8)
    scales = exponents.bitwise_left_shift(FP32_MANTISSA_BITS).view(torch.float32)
    inverses = (254 - exponents).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
    codes = (values * _spread(inverses, columns)).to(torch.float8_e4m3fn).view(torch.uint8)
    codes.masked_fill_(_spread(is_poisoned, columns), E4M3.nan_code)
    return codes, scales.masked_fill_(is_poisoned, torch.nan)


def _spread(per_block: Tensor, columns: int) -> Tensor:
    return per_block.repeat_interleave(TILE)[:columns]


def decode_blocks_on_cpu(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Values [..., rows, columns] of `dtype`."""
    rows, columns = blocks.shape[-2:]
    per_row = blocks.scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    values = dequantise_tiles(
        blocks.codes.reshape(-1, columns), per_row.reshape(-1, num_tiles(columns)), dtype
    )
    return values.view(blocks.shape)
