"""The Triton form of the tile quantiser: interpreted, compiled for sm_90 ahead of time, and on a GPU."""

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from moe_comm.wire.tile import ScaleKind, dequantise_tiles, quantise_tiles

from tests.arch.sources import ROOT
from tests.unit.comm.wire_values import heavy_tailed, on_ties, random_bits, same_bits, special_tiles

triton = pytest.importorskip("triton", reason="needs triton (extra gpu)")

KINDS: list[ScaleKind] = ["fp32", "pow2"]
POINTERS = {"fp32": "*fp32", "pow2": "*u8"}


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> Any:
    """The kernel compiled for sm_90 with these pointer types; the other arguments are 32-bit integers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.fixture(scope="module")
def kernels() -> Any:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set: kernels cannot be compiled in this process")
    from moe_comm.wire import tile_triton

    return tile_triton


def test_every_interpreted_case_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.comm.wire_interpreted"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 7
    assert not {name: trace for name, trace in results.items() if trace}


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_compiles_for_sm_90_with_one_exact_division_at_most(kernels: Any, kind: str) -> None:
    made = compiled(
        kernels.quantise_kernel,
        {"values": "*bf16", "codes": "*u8", "scales": POINTERS[kind]},
        {"POW2": kind == "pow2", "HARDWARE_CAST": False, "ROWS": 32},
    )
    assert made.asm["cubin"].startswith(b"\x7fELF")
    ptx = made.asm["ptx"]
    assert ".target sm_90" in ptx
    # Nothing that would give other bits: fused products and sums, flushed subnormals, approximations.
    assert not [
        word for word in ("fma.", ".ftz", "div.full", "div.approx", "rcp.", "cvt.rn.sat") if word in ptx
    ]
    assert ("div.rn.f32" in ptx) == (kind == "fp32")


def test_the_cast_instruction_is_used_where_asked_for(kernels: Any) -> None:
    made = compiled(
        kernels.quantise_kernel,
        {"values": "*fp32", "codes": "*u8", "scales": "*u8"},
        {"POW2": True, "HARDWARE_CAST": True, "ROWS": 32},
    )
    assert "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_compiles_for_sm_90(kernels: Any, kind: str) -> None:
    made = compiled(
        kernels.dequantise_kernel,
        {"values": "*bf16", "codes": "*u8", "scales": POINTERS[kind]},
        {"POW2": kind == "pow2", "ROWS": 32},
    )
    assert made.asm["cubin"].startswith(b"\x7fELF")
    assert not [word for word in ("fma.", ".ftz") if word in made.asm["ptx"]]
    assert "cvt.rn.bf16" in made.asm["ptx"]  # to nearest even, once


def test_constants_of_the_kernel_are_those_of_the_cpu_form(kernels: Any) -> None:
    from moe_comm.wire import tile

    assert kernels.TILE.value == tile.TILE
    assert kernels._FLOOR_BITS.value == tile._FLOOR_BITS
    assert kernels._NAN_SCALE_BYTE.value == tile.NAN_SCALE_BYTE
    assert hex(tile._OVER_MAX_MANTISSA).lower() in inspect.getsource(kernels.quantise_tile.fn).lower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hardware_cast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_bits_of_the_cpu_form(kernels: Any, kind: ScaleKind, hardware_cast: bool) -> None:
    for values in (
        heavy_tailed(500, 7168, seed=1),
        random_bits(500, 300, seed=2),
        special_tiles(131),
        on_ties(512),
        *(on_ties(512).nextafter(torch.tensor(side)) for side in (448.0, -448.0)),
    ):
        codes, scales = kernels.quantise_on_device(values.cuda(), kind == "pow2", hardware_cast)
        wanted, wanted_scales = quantise_tiles(values, kind)
        assert torch.equal(codes.cpu(), wanted) and same_bits(scales.cpu(), wanted_scales)
        decoded = dequantise_tiles(codes, scales, torch.bfloat16).cpu()
        assert same_bits(decoded, dequantise_tiles(wanted, wanted_scales, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp64_on_a_gpu_is_rounded_to_fp32_first() -> None:
    values = heavy_tailed(5, 300, seed=3).double() * (1 + 2.0**-30)
    codes, scales = quantise_tiles(values.cuda())
    assert torch.equal(codes.cpu(), quantise_tiles(values)[0])
    assert torch.equal(
        dequantise_tiles(codes, scales, torch.float64).cpu(),
        dequantise_tiles(*quantise_tiles(values), torch.float64),
    )
