"""Matrices as E4M3 codes with one scale for each 128 x 128 block, as DeepSeek stores them. Ref: DSV3 §3.3.2.

`NAME.weight` holds the codes, `NAME.weight_scale_inv` the factors that codes are multiplied by. Blocks at the
lower and right edge are smaller: they are quantised as if zeros filled them up, and zeros are not stored.

Exactness. A value is code x scale in FP32, rounded once. Whoever quantises such values anew finds the codes
only if he finds the scale, and the values alone do not always tell it: codes 1, 2 with scale 2 are the same
values as 2, 4 with scale 1, a block of zeros fits any scale, and for amax / 448 two neighbouring scales may
round to the same amax. So an import records the scales, and `quantise` takes a recorded one wherever it gives
back every value of the matrix bit for bit, which also proves that the weights have not moved since. A scale
down to 2^-100 keeps code x scale clear of FP32's subnormals, and then value / scale lies within 2^-23 of the
code, far nearer than half a step of E4M3.
"""

from typing import Any

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.fp8.cast import cast_weight
from moe_runtime.fp8.tiled import TILE, num_tiles

SCALE_SUFFIX = "_scale_inv"
CODES = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
# What `--fp8` writes of its own: scales are powers of two, kept in FP32, as DeepSeek-V3.1 has them.
QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [TILE, TILE],
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
}
_FIXED = {key: QUANTIZATION[key] for key in ("quant_method", "fmt", "weight_block_size")}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a matrix: [rows / 128, columns / 128], rounded up."""
    return num_tiles(shape[0]), num_tiles(shape[1])


def check_quantization(fields: dict[str, Any], where: str) -> None:
    """Refuse a `quantization_config` of another kind.

    Raises:
        CheckpointError: names the key.
    """
    for key, wanted in _FIXED.items():
        got = fields.get(key, wanted if key == "fmt" else None)
        if got != wanted:
            raise CheckpointError(f"{where}: quantization_config.{key}: expected {wanted}, got {got!r}")
    if fields.get("scale_fmt") not in (None, "float", "ue8m0"):
        got = fields["scale_fmt"]
        raise CheckpointError(f"{where}: quantization_config.scale_fmt: expected ue8m0 or none, got {got!r}")


def dequantise_into(out: Tensor, codes: Tensor, scales: Tensor, where: str) -> None:
    """Write code x scale into `out`, band by band, rounded once to its dtype.

    Args:
        out: [rows, columns], FP32, BF16 or FP16.
        codes: float8_e4m3fn [rows, columns].
        scales: [row blocks, column blocks], of any floating dtype.
        where: file and tensor, for messages.

    Raises:
        CheckpointError: a value is not finite.
    """
    spread = _spread(scales, codes.shape[1])
    for block in range(spread.shape[0]):
        band = slice(block * TILE, (block + 1) * TILE)
        values = codes[band].float() * spread[block]
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{where}: expected finite values, got infinity or NaN in rows {band.start}.."
            )
        out[band].copy_(values)


def quantise(weight: Tensor, recorded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [rows, columns] and scales [row blocks, column blocks] of a matrix.

    Args:
        weight: [rows, columns] of FP32, BF16 or FP16.
        recorded: scales that the values may have come from; taken if they give back every value.

    Returns:
        Scales are `recorded` itself, or powers of two in FP32.
    """
    if recorded is not None:
        codes = _codes_under(weight, recorded)
        if codes is not None:
            return codes, recorded
    blocks = cast_weight(weight)
    return blocks.codes.view(torch.float8_e4m3fn), blocks.scales


def _codes_under(weight: Tensor, scales: Tensor) -> Tensor | None:
    """Codes that give back `weight` under these scales, or None if there are none."""
    spread = _spread(scales, weight.shape[1])
    divisor = torch.where(spread == 0, 1.0, spread)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for block in range(spread.shape[0]):
        band = slice(block * TILE, (block + 1) * TILE)
        codes[band] = (weight[band].float() / divisor[block]).to(torch.float8_e4m3fn)
        again = (codes[band].float() * spread[block]).to(weight.dtype)
        if not torch.equal(again, weight[band]):
            return None
    return codes


def _spread(scales: Tensor, columns: int) -> Tensor:
    """FP32 scales [row blocks, columns]."""
    return scales.float().repeat_interleave(TILE, dim=1)[:, :columns]
