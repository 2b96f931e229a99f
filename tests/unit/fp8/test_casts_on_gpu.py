"""The casts on a real GPU: the checks of the benchmark, and every value through the cast instruction."""

import pytest
import torch

from moe_runtime.fp8 import cast
from tests.unit.comm.wire_values import heavy_tailed, on_ties, random_bits, same_bits, special_tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_check_of_the_benchmark_holds() -> None:
    from benchmarks import fp8_cast_checks

    x = torch.randn(1024, 512, device="cuda").bfloat16()
    assert fp8_cast_checks.check_all(x, torch.rand(512, device="cuda")) == {}


@pytest.mark.parametrize("hardware_cast", [False, True])
def test_a_gpu_gives_the_bits_of_the_cpu_form(hardware_cast: bool) -> None:
    from moe_runtime.fp8 import cast_triton

    for values in (
        heavy_tailed(300, 384, seed=1),
        random_bits(500, 300, seed=2),
        special_tiles(131),
        on_ties(512),
        *(on_ties(512).nextafter(torch.tensor(side)) for side in (448.0, -448.0)),
    ):
        for make, wanted in (
            (cast_triton.cast_rows_on_device, cast.cast_rows(values)),
            (cast_triton.cast_columns_on_device, cast.cast_columns(values)),
        ):
            ours = make(values.cuda(), hardware_cast=hardware_cast)
            assert torch.equal(ours.codes.cpu(), wanted.codes)
            assert same_bits(ours.scales.contiguous().cpu(), wanted.scales.contiguous())


def test_a_gpu_puts_the_columns_of_groups_together_as_one_copy_for_each_does() -> None:
    from moe_runtime.fp8.gemm_deepgemm_groups import group_major, spans_of
    from moe_runtime.fp8.group_major_triton import group_major_on_device

    padded = torch.tensor([0, 1024, 128, 0, 896])
    codes = torch.randint(256, (4100, int(padded.sum())), dtype=torch.uint8, device="cuda")
    ours = group_major_on_device(codes, spans_of(padded).to(torch.int32).cuda())
    assert torch.equal(ours, group_major(codes, padded.tolist()))
