"""What E5M6's kernels must do, in Triton's interpreter against the CPU form; run as `cast_cases.py` is."""

import torch

from moe_runtime.fp8 import e5m6, e5m6_triton
from moe_runtime.fp8.e5m6 import Packed
from tests.unit.comm.wire_values import random_bits, same_bits, special_tiles
from tests.unit.fp8.cast_cases import main
from tests.unit.fp8.fp8_values import groups_of, mixed, poisoned, same


def inputs() -> list[torch.Tensor]:
    return [
        *(poisoned(mixed(35, columns, columns)) for columns in (1, 127, 130, 256)),
        special_tiles(131),
        random_bits(9, 130, 1),
        torch.empty(0, 130),
        torch.empty(3, 0),
    ]


def same_packed(ours: Packed, theirs: Packed) -> bool:
    return torch.equal(ours.data, theirs.data) and same_bits(ours.scales, theirs.scales)


def case_packing_gives_the_bits_of_the_cpu_form() -> None:
    for x in inputs():
        for values in (x, x.bfloat16(), x.double()):
            assert same_packed(e5m6_triton.pack_e5m6_on_device(values), e5m6.pack_e5m6(values))
    strided = mixed(9, 400, 5)[::2, 3:303]
    assert same_packed(e5m6_triton.pack_e5m6_on_device(strided), e5m6.pack_e5m6(strided))


def case_every_code_and_every_midpoint_is_rounded_as_on_a_cpu() -> None:
    codes = torch.arange(0x7C0, dtype=torch.int32)
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    spread = torch.zeros(-(-points.numel() // 127), 127)
    spread.view(-1)[: points.numel()] = points
    # The largest value in front, so that the scale of each tile is 1.
    x = torch.cat([torch.full((spread.shape[0], 1), e5m6.MAX), spread], dim=1)
    x = torch.cat([x, -x])
    packed = e5m6_triton.pack_e5m6_on_device(x)
    assert (packed.scales == 1).all() and same_packed(packed, e5m6.pack_e5m6(x))


def case_unpacking_gives_the_bits_of_the_cpu_form() -> None:
    for x in inputs():
        packed = e5m6.pack_e5m6(x)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            ours = e5m6_triton.unpack_e5m6_on_device(packed, dtype)
            assert same_bits(ours, e5m6.unpack_e5m6(packed, dtype))


def case_columns_are_those_of_the_cpu_form() -> None:
    for counts, columns in (([0, 131, 0, 1, 0], 130), ([127, 129, 3], 5), ([0, 0], 130)):
        groups = groups_of(counts)
        packed = e5m6.pack_e5m6(poisoned(mixed(sum(counts), columns, 7)))
        ours = e5m6_triton.columns_of_packed_on_device(packed, groups)
        assert same(ours, e5m6.columns_of_packed(packed, groups))


def case_the_comparison_sees_one_bit() -> None:
    packed = e5m6_triton.pack_e5m6_on_device(mixed(4, 130, 1))
    packed.data[2, 193] ^= 0x10
    assert not same_packed(packed, e5m6.pack_e5m6(mixed(4, 130, 1)))


if __name__ == "__main__":
    main(globals())
