"""The Triton kernel of FP8 products: interpreted, compiled for sm_90 ahead of time, and on a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.cli.bench_fp8.cases import Shape, fp8_call, groups_of, make_operands
from moe_runtime.fp8.difference import difference
from tests.arch.sources import ROOT

triton = pytest.importorskip("triton", reason="needs triton (extra gpu)")

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}
_COUNTS = (70, 0, 186)
SHAPES = [
    Shape("dense", 256, 256, 512),
    Shape("groups", 256, 256, 512, _COUNTS),
    Shape("wgrad", 256, 384, 512),
    Shape("wgrad_groups", 256, 384, 256, _COUNTS),
]


def test_every_interpreted_case_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.fp8.gemm_interpreted"],
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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Filled with (kernel, arguments by name) of what is launched from now on."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    noted: list[tuple[Any, dict[str, Any]]] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", note)
    return noted


def compiled(kernel: Any, arguments: dict[str, Any], **changed: Any) -> Any:
    """The kernel for sm_90, specialised as a launch with these arguments would be."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = arguments | changed
    loose = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif name.isupper() or value == 1:
            signature[name], constants[(position,)] = "constexpr", value
        else:
            signature[name] = "i32"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if signature[name] != "constexpr" and name not in loose and number % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def instructions(made: Any, folder: Path) -> list[str]:
    """Names of the machine instructions, in order."""
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
    code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)


# Variants whose code differs little from another's.
_SLOW = ("groups", "wgrad")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=shape.role, marks=[pytest.mark.slow] if shape.role in _SLOW else [])
        for shape in SHAPES
    ],
)
def test_compiles_for_sm_90_to_fp8_products_without_spills(
    shape: Shape, launches: list[tuple[Any, dict[str, Any]]], tmp_path: Path
) -> None:
    from moe_runtime.fp8 import gemm_triton

    device = torch.device("cpu")
    groups = groups_of(shape, device) if shape.counts else None
    fp8_call(shape, groups, make_operands(shape, device, 0), gemm_triton, "wgrad" in shape.role)()
    (kernel, arguments) = launches[0]
    made = compiled(kernel, arguments)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in made.asm["ptx"]
    found = instructions(made, tmp_path)
    products = [name for name in found if name.startswith("QGMMA")]
    assert products and set(products) == {"QGMMA.64x128x32.F32.E4M3.E4M3"}
    assert "UTMALDG.2D" in found
    assert not [name for name in found if name.startswith(("LDL", "STL"))]
    assert made.metadata.shared <= 227 * 1024  # of a multiprocessor
    # The scales of a part come between its products and the next ones: four instructions of 32 are 128.
    assert len(products) % 4 == 0


def test_the_check_sees_a_spill(launches: list[tuple[Any, dict[str, Any]]], tmp_path: Path) -> None:
    from moe_runtime.fp8 import gemm_triton

    x = make_operands(SHAPES[0], torch.device("cpu"), 0)
    fp8_call(SHAPES[0], None, x, gemm_triton, False)()
    (kernel, arguments) = launches[0]
    made = compiled(kernel, arguments, BLOCK_M=128, BLOCK_N=256, num_warps=8, num_stages=2)
    assert [name for name in instructions(made, tmp_path) if name.startswith(("LDL", "STL"))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "scaled_mm", "deepgemm"])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        Shape("dense", 250, 500, 300),
        Shape("dense", 129, 4096, 7168),
        Shape("groups", 4100, 2112, 1536, (4096, 0, 3, 1)),
        Shape("wgrad_groups", 520, 264, 4100, (4096, 0, 3, 1)),
        Shape("groups", 0, 256, 512, (0, 0)),
        Shape("wgrad_groups", 256, 384, 0, (0, 0)),
    ],
    ids=lambda shape: shape.name,
)
def test_a_gpu_gives_the_product_of_the_reference(shape: Shape, backend: str) -> None:
    from moe_runtime.fp8 import gemm_reference
    from moe_runtime.fp8.gemm_choice import cannot_run, module_of

    device = torch.device("cuda")
    reason = cannot_run(backend, device)
    if reason:
        pytest.skip(f"expected {reason}")
    groups = groups_of(shape, device) if shape.counts else None
    x = make_operands(shape, device, 0)
    x.out.fill_(torch.nan)
    fp8_call(shape, groups, x, module_of(backend), False)()
    ours = x.out.clone()
    fp8_call(shape, groups, x, gemm_reference, False)()
    assert not ours.isnan().any()
    assert difference(x.out, ours) < 1e-5
