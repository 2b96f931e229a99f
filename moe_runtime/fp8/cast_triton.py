"""Casts on a GPU, by the names of `cast.py` with `_on_device`: same arguments, same results, same bits."""

from moe_runtime.fp8.cast_triton_columns import cast_both_on_device, cast_columns_on_device
from moe_runtime.fp8.cast_triton_gated import cast_gated_on_device, cast_gated_tiles_on_device
from moe_runtime.fp8.cast_triton_gated_backward import gated_backward_cast_on_device
from moe_runtime.fp8.cast_triton_normed import cast_normed_on_device
from moe_runtime.fp8.cast_triton_retile import columns_of_on_device
from moe_runtime.fp8.cast_triton_rows import cast_rows_on_device, decode_on_device
from moe_runtime.fp8.cast_triton_weight import cast_weight_both_on_device, cast_weight_on_device

__all__ = [
    "cast_both_on_device",
    "cast_columns_on_device",
    "cast_gated_on_device",
    "cast_gated_tiles_on_device",
    "cast_normed_on_device",
    "cast_rows_on_device",
    "cast_weight_both_on_device",
    "cast_weight_on_device",
    "columns_of_on_device",
    "decode_on_device",
    "gated_backward_cast_on_device",
]
