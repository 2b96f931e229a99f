"""What the Triton form of the tile quantiser must do, run by Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is defined, so this runs in a process of its own:
`python -m tests.unit.comm.wire_interpreted` runs each `case_` and prints {name: what went wrong or ""}.
"""

import json
import sys
import traceback
import warnings

import torch
import triton
import triton.language as tl
from moe_comm.wire.tile import ScaleKind, dequantise_tiles, quantise_tiles
from moe_comm.wire.tile_triton import dequantise_on_device, quantise_on_device, quantise_tile

from tests.unit.comm.wire_values import heavy_tailed, on_ties, random_bits, same_bits, special_tiles

KINDS: list[ScaleKind] = ["fp32", "pow2"]


def inputs() -> list[torch.Tensor]:
    return [
        heavy_tailed(45, 300, seed=1),
        random_bits(70, 300, seed=2),
        random_bits(3, 128, seed=3),
        special_tiles(131),
        special_tiles(1),
        on_ties(512),
    ]


@triton.jit
def one_tile_kernel(values: tl.tensor, codes: tl.tensor, scale: tl.tensor, POW2: tl.constexpr) -> None:
    """A kernel that quantises a tile of one axis, as one that works row by row would."""
    column = tl.arange(0, 128)
    made, made_scale = quantise_tile(tl.load(values + column), POW2)
    tl.store(codes + column, made)
    tl.store(scale, made_scale)


def case_codes_and_scales_are_the_bits_of_the_cpu_form() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for values in inputs():
            for kind in KINDS:
                codes, scales = quantise_on_device(values.to(dtype), kind == "pow2")
                wanted, wanted_scales = quantise_tiles(values.to(dtype), kind)
                assert torch.equal(codes, wanted) and same_bits(scales, wanted_scales), (dtype, kind)


def case_decoding_strided_views_gives_the_bits_of_the_cpu_form() -> None:
    for values in inputs():
        for kind in KINDS:
            codes, scales = quantise_tiles(values, kind)
            rows, columns = codes.shape
            record = torch.full((rows, columns + 7), 0x55, dtype=torch.uint8)
            record[:, 3 : columns + 3] = codes
            # Not BF16: the interpreter cuts it off instead of rounding it. See the PTX test for that one.
            for dtype in (torch.float32, torch.float16):
                decoded = dequantise_on_device(record[:, 3 : columns + 3], scales, dtype)
                assert same_bits(decoded, dequantise_tiles(codes, scales, dtype)), (dtype, kind)


def case_any_code_is_decoded_as_on_the_cpu() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    for scales in (
        torch.tensor([[19, 127], [247, 254], [255, 3], [100, 0]], dtype=torch.uint8),
        torch.ones(4, 2),
    ):
        decoded = dequantise_on_device(codes, scales, torch.float32)
        assert same_bits(decoded, dequantise_tiles(codes, scales))


def case_a_block_of_one_axis_is_one_tile() -> None:
    for values in (*heavy_tailed(2, 128, seed=4), special_tiles(128)[0], special_tiles(128)[-1]):
        for kind in KINDS:
            wanted, wanted_scale = quantise_tiles(values.unsqueeze(0), kind)
            codes, scale = torch.empty_like(wanted[0]), torch.empty_like(wanted_scale[0])
            one_tile_kernel[(1,)](values, codes, scale, POW2=kind == "pow2")
            assert torch.equal(codes, wanted[0]) and same_bits(scale, wanted_scale[0])


def case_strided_rows_are_read_where_they_lie() -> None:
    values = heavy_tailed(9, 400, seed=5)[::2, 3:303]
    assert torch.equal(quantise_on_device(values, False)[0], quantise_tiles(values)[0])


def case_nothing_is_launched_for_no_elements() -> None:
    for shape in ((0, 300), (3, 0)):
        codes, scales = quantise_on_device(torch.ones(shape), True)
        assert codes.shape == shape and dequantise_on_device(codes, scales, torch.float32).shape == shape


def case_the_comparison_sees_the_interpreters_own_cast() -> None:
    """The planted fault: that cast is wrong in about 2% of the values, and must not pass."""
    codes, _ = quantise_on_device(on_ties(512), True, hardware_cast=True)
    assert not torch.equal(codes, quantise_tiles(on_ties(512), "pow2")[0])


def main() -> None:
    # NumPy, which the interpreter computes with, warns of products that the poisoned tiles discard.
    warnings.simplefilter("ignore", RuntimeWarning)
    results = {}
    for name, case in sorted(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
