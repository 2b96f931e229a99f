"""What the wrappers launch at the full width of 7,168 compiles for sm_90 ahead of time, without a GPU.

The wrappers are called on CPU tensors while Triton's launcher only notes what it is asked for; each
launch is then compiled as Triton itself would specialise it (pointers and numbers that are multiples of
16 are told to the compiler). The instructions are read from the cubin with the disassembler that Triton
brings: a register that was spilled shows as a load from or a store to local memory (LDL, STL).
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

TOKENS, TOP_K, HIDDEN = 4, 8, 7168
ROWS = TOKENS * TOP_K
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One call of a kernel: the function and its arguments by name, launch options included."""

    kernel: Any
    arguments: dict[str, Any]


class Binary(NamedTuple):
    """A compiled kernel: its cubin, and the names of its instructions in order."""

    cubin: bytes
    instructions: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, instruction) is not None for instruction in self.instructions)


SPILLS = r"LDL.*|STL.*"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels are kept for this module only: what a run shows, it compiled."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Launch]:
    """Filled with what wrappers launch from now on."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    noted: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", note)
    return noted


def compile_sm90(launch: Launch, folder: Path, **changed: Any) -> Binary:
    """Compile a launch, with some arguments or options changed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    arguments = launch.arguments | changed
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = arguments[name]
        is_number = type(value) is int and not name.isupper() and value != 1
        signature[name] = (
            _TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if is_number else "constexpr"
        )
        if signature[name] == "constexpr":
            constants[(position,)] = value
        elif (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in arguments.items() if name not in names}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
    code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return Binary(
        built.asm["cubin"], re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    )


def rows_of(columns: int, dtype: torch.dtype, row_bytes: int | None = None) -> Tensor:
    """[ROWS, columns]; inside records of row_bytes, if given."""
    buffer = torch.zeros(ROWS, row_bytes or columns * dtype.itemsize, dtype=torch.uint8)
    return buffer[:, : columns * dtype.itemsize].view(dtype)


TOKEN_VALUES = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
SLOT_ROWS = torch.arange(ROWS).view(TOKENS, TOP_K)
WEIGHTS = torch.zeros(TOKENS, TOP_K)


def call_permute(row_bytes: int | None = None) -> None:
    from moe_comm.kernels.permute import permute_tokens

    permute_tokens(TOKEN_VALUES, SLOT_ROWS, rows_of(HIDDEN, torch.bfloat16, row_bytes))


def call_quantise(scale_dtype: torch.dtype, hardware_cast: bool) -> None:
    from moe_comm.kernels.permute import permute_quantise

    codes, scales = rows_of(HIDDEN, torch.uint8, 7424), rows_of(56, scale_dtype, 7424)
    permute_quantise(TOKEN_VALUES, SLOT_ROWS, codes, scales, hardware_cast=hardware_cast)


def call_gather(columns: int, dtype: torch.dtype) -> None:
    from moe_comm.kernels.permute import gather_rows

    gather_rows(rows_of(columns, dtype), SLOT_ROWS.view(-1))


def call_sum(ragged: bool, dtype: torch.dtype) -> None:
    from moe_comm.kernels.unpermute import sum_rows

    offsets = torch.arange(0, ROWS + 1, TOP_K)
    bags = (SLOT_ROWS.view(-1), offsets, WEIGHTS.view(-1)) if ragged else (SLOT_ROWS,)
    sum_rows(rows_of(HIDDEN, dtype), *bags)


def call_backward(ragged: bool) -> None:
    from moe_comm.kernels.unpermute import sum_rows_backward

    rows, d_rows = rows_of(HIDDEN, torch.bfloat16), rows_of(HIDDEN, torch.bfloat16)
    if ragged:
        offsets = torch.arange(0, ROWS + 1, TOP_K)
        sum_rows_backward(TOKEN_VALUES, SLOT_ROWS.view(-1), d_rows, offsets, WEIGHTS.view(-1), rows)
    else:
        sum_rows_backward(TOKEN_VALUES, SLOT_ROWS, d_rows)


def call_layout() -> None:
    from moe_comm.kernels.layout import plan_slots

    plan_slots(torch.zeros(1024, TOP_K, dtype=torch.int64), 256)


# By name: the call, how many kernels it launches, and instructions that the last one must have. Wide
# ones prove the 16 bytes a thread (8 for codes: 8 values of 2 bytes are 8 of 1) that the speed rests on.
CASES: dict[str, tuple[Callable[[], None], int, tuple[str, ...]]] = {
    "permute": (call_permute, 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "permute into records": (lambda: call_permute(14352), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "quantise": (lambda: call_quantise(torch.float32, False), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "quantise, pow2": (lambda: call_quantise(torch.uint8, False), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "quantise, cast instruction": (lambda: call_quantise(torch.float32, True), 1, (r"F2FP\.\S*E4M3\S*",)),
    "gather": (lambda: call_gather(HIDDEN, torch.bfloat16), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "gather of weights": (lambda: call_gather(1, torch.float32), 1, (r"LDG\.E",)),
    "sum": (lambda: call_sum(False, torch.bfloat16), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "sum, ragged and weighted": (lambda: call_sum(True, torch.bfloat16), 1, (r"LDG\.E\.128",)),
    "sum of float32": (lambda: call_sum(False, torch.float32), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "backward of rows": (lambda: call_backward(False), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "backward of rows and weights": (lambda: call_backward(True), 1, (r"LDG\.E\.128", r"STG\.E\.EF\.128")),
    "layout": (call_layout, 2, (r"STG\.E\.64",)),
}


# Variants whose code differs little from another's.
SLOW = {"quantise, pow2", "gather of weights", "sum of float32", "backward of rows", "permute into records"}
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_compiles_for_sm_90_without_spills(name: str, launches: list[Launch], cache: Path) -> None:
    call, num_kernels, wanted = CASES[name]
    call()
    assert len(launches) == num_kernels
    binaries = [compile_sm90(launch, cache) for launch in launches]
    for binary in binaries:
        assert binary.cubin[:4] == b"\x7fELF"
        assert binary.count(SPILLS) == 0
    for pattern in wanted:
        assert binaries[-1].count(pattern), (pattern, sorted(set(binaries[-1].instructions)))


def test_a_sum_asks_for_several_rows_before_it_adds_the_first(launches: list[Launch], cache: Path) -> None:
    call_sum(False, torch.bfloat16)
    instructions = compile_sm90(launches[0], cache).instructions
    first = next(place for place, name in enumerate(instructions) if name.startswith("FADD"))
    assert instructions[:first].count("LDG.E.128") >= 2


def test_products_are_rounded_before_they_are_added(launches: list[Launch], cache: Path) -> None:
    call_sum(True, torch.bfloat16)
    binary = compile_sm90(launches[0], cache)
    assert binary.count(r"FFMA.*") == 0
    assert compile_sm90(launches[0], cache, enable_fp_fusion=True).count(r"FFMA.*") > 0


def test_the_checks_see_a_spill_and_a_narrow_access(launches: list[Launch], cache: Path) -> None:
    call_permute(14338)  # records of 2 mod 16 bytes
    call_sum(False, torch.bfloat16)
    assert compile_sm90(launches[1], cache, maxnreg=16).count(SPILLS) > 0
    assert compile_sm90(launches[0], cache).count(r"STG.*\.128") == 0
