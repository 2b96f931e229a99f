"""Which plans of the Triton kernel and which back ends are worth having: a sweep on one GPU, in parts.

    PYTHONPATH=.:comm python3 benchmarks/fp8_gemm.py --out FOLDER [--wheels FOLDER] [--seconds 150]

Each part is a process of its own with a limit, so that one that hangs or breaks costs its own lines only;
lines are written as they come, to FOLDER/<part>.jsonl. Wheels of DeepGEMM (and of what it needs) are unpacked
beside the results and tried in turn; kernels of the first that loads are compiled while Triton is measured.
The results are for reading: `moe-runtime bench fp8 --device cuda --write-table` makes the table that is used.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_fp8.cases import Shape, gpu_shapes, ragged

SWEPT = [
    Shape("dense", 4096, 4096, 4096),
    Shape("dense", 4096, 4096, 7168),
    Shape("dense", 8192, 7168, 16384),
    Shape("groups", 8 * 4096, 4096, 7168, (4096,) * 8),
    Shape("groups", sum(ragged(32, 1024)), 7168, 2048, ragged(32, 1024)),
    Shape("wgrad", 4096, 7168, 8192),
    Shape("wgrad_groups", 4096, 7168, sum(ragged(8, 4096)), ragged(8, 4096)),
]
COMPARED = [
    *SWEPT,
    *(shape for shape in gpu_shapes() if shape.role == "dense" and shape.m == 4096 and shape.n != 36864),
]
PLAIN = [(64, 128, 4, 3, 3, 8), (64, 128, 4, 4, 2, 8), (64, 128, 4, 3, 2, 16), (128, 64, 4, 3, 3, 8),
         (128, 128, 8, 3, 1, 8), (128, 128, 8, 4, 1, 8), (64, 64, 4, 4, 4, 8)]  # fmt: skip
SPECIALISED = [(128, 128, 4, 4, 1, 8), (128, 128, 4, 3, 1, 8), (128, 128, 4, 5, 1, 8), (128, 128, 4, 6, 1, 8),
               (128, 128, 4, 4, 1, 4), (128, 128, 4, 4, 1, 16), (128, 64, 4, 4, 1, 8),
               (128, 64, 4, 6, 1, 8)]  # fmt: skip
WARMERS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--part", default="all")
    return parser.parse_args()


def write(options: argparse.Namespace, line: dict[str, Any]) -> None:
    """A line of a part's results, at once on disk and on the screen."""
    text = json.dumps(line)
    with (options.out / f"{options.part.split(':')[0]}.jsonl").open("a") as file:
        file.write(text + "\n")
    print(options.part, text, flush=True)


def part_peaks(options: argparse.Namespace) -> None:
    import torch

    from moe_runtime.cli.bench_fp8.clock import peaks

    write(options, {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **peaks()})


def part_library(options: argparse.Namespace, backend: str = "scaled_mm") -> None:
    """A back end that has no plans, at all shapes."""
    import torch

    from moe_runtime.cli.bench_fp8.measure import measure_shape

    for shape in COMPARED:
        if backend == "deepgemm" or shape.role in ("dense", "wgrad") or shape in SWEPT:
            write(options, measure_shape(shape, torch.device("cuda"), [backend]))
        torch.cuda.empty_cache()


def part_deepgemm(options: argparse.Namespace) -> None:
    part_library(options, "deepgemm")


def part_warm(options: argparse.Namespace) -> None:
    """Have DeepGEMM compile what some of the shapes need."""
    import torch

    from moe_runtime.cli.bench_fp8.cases import fp8_call, groups_of, make_operands
    from moe_runtime.fp8 import gemm_deepgemm

    device = torch.device("cuda")
    for shape in COMPARED[int(options.part.split(":")[1]) :: WARMERS]:
        begin = time.perf_counter()
        groups = groups_of(shape, device) if shape.counts else None
        try:
            fp8_call(shape, groups, make_operands(shape, device, 0), gemm_deepgemm, False)()
            torch.cuda.synchronize()
            found = "done"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:300]
        write(
            options, {"shape": shape.name, "result": found, "seconds": round(time.perf_counter() - begin, 1)}
        )


def plans() -> list[Any]:
    """All plans of the sweep."""
    from moe_runtime.fp8.gemm_triton import Plan

    return [
        Plan(m, n, warps, stages, programs, specialised, band)
        for specialised, rows in ((True, SPECIALISED), (False, PLAIN))
        for m, n, warps, stages, programs, band in rows
    ]


class CompileOnly:
    """Stands for a kernel and compiles it for each launch instead."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values, **options: self.kernel.warmup(*values, grid=grid, **options)


def part_compile(options: argparse.Namespace) -> None:
    """One plan of the kernel for all roles, into Triton's cache."""
    import torch

    from moe_runtime.cli.bench_fp8.cases import fp8_call, groups_of, make_operands
    from moe_runtime.fp8 import gemm_triton

    gemm_triton.product_kernel = CompileOnly(gemm_triton.product_kernel)
    device = torch.device("cuda")
    plan = plans()[int(options.part.split(":")[1])]
    for role in ("dense", "groups", "wgrad", "wgrad_groups"):
        shape = Shape(role, 512, 512, 512, (512,) if "groups" in role else ())
        groups = groups_of(shape, device) if shape.counts else None
        x = make_operands(shape, device, 0)
        for adds in (False, True) if "wgrad" in role else (False,):
            fp8_call(shape, groups, x, gemm_triton, adds, plan=plan)()


def part_plans(options: argparse.Namespace) -> None:
    """Every plan of the kernel at the swept shapes, the best of the first shape first."""
    import torch

    from moe_runtime.cli.bench_fp8.measure import measure_shape

    for shape in SWEPT:
        for plan in plans():
            if plan.specialised != (options.part == "specialised"):
                continue
            try:
                line = measure_shape(shape, torch.device("cuda"), ["triton"], 12, plan=plan)
            except Exception as error:
                line = {"shape": shape.name, "failed": f"{type(error).__name__}: {error}"[:300]}
            write(options, {"plan": dataclasses.asdict(plan), **line})
        torch.cuda.empty_cache()


def part_import(options: argparse.Namespace) -> None:
    """Whether the unpacked wheels of this version load and multiply."""
    import torch

    from moe_runtime.cli.bench_fp8.measure import measure_shape

    line = measure_shape(Shape("dense", 512, 512, 512), torch.device("cuda"), ["deepgemm"], 5)
    write(options, {"version": options.part, **line})
    sys.exit(0 if line["tflops"].get("deepgemm") else 1)


PARTS = {
    "peaks": part_peaks,
    "scaled_mm": part_library,
    "deepgemm": part_deepgemm,
    "warm": part_warm,
    "plain": part_plans,
    "specialised": part_plans,
    "import": part_import,
    "compile": part_compile,
}


def unpacked(wheels: Path, target: Path) -> Iterator[tuple[str, Path]]:
    """(version, folder) of each wheel of DeepGEMM with the newest of the other wheels that it can use."""
    for wheel in sorted(wheels.glob("sgl_deep_gemm-*.whl"), reverse=True):
        version = wheel.name.split("-")[1]
        others = sorted(wheels.glob("apache_tvm_ffi-*.whl"))
        for other in reversed(others):
            folder = target / f"{version}+{other.name.split('-')[1]}"
            for archive in (wheel, other):
                zipfile.ZipFile(archive).extractall(folder)
            yield folder.name, folder


def start(options: argparse.Namespace, part: str, folder: Path | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if folder:
        environment["PYTHONPATH"] = f"{folder}:{environment.get('PYTHONPATH', '')}"
        environment["DG_JIT_CACHE_DIR"] = str(folder / "jit")
    command = [sys.executable, __file__, "--out", str(options.out), "--part", part]
    return subprocess.Popen(command, env=environment)


def finish(process: subprocess.Popen[bytes], seconds: float, part: str) -> int:
    """Its exit code; a process that takes too long is killed."""
    begin = time.monotonic()
    try:
        process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"{part}: killed after {seconds:.0f} s", flush=True)
    print(f"{part}: exit {process.returncode} after {time.monotonic() - begin:.1f} s", flush=True)
    return process.returncode


def run_all(options: argparse.Namespace) -> None:
    end = time.monotonic() + options.seconds

    def left() -> float:
        return end - time.monotonic()

    with tempfile.TemporaryDirectory() as target:
        tries: dict[str, tuple[Path, subprocess.Popen[bytes]]] = {}
        for version, folder in unpacked(options.wheels, Path(target)) if options.wheels else ():
            tries[version] = folder, start(options, f"import:{version}", folder)
        compilers = [start(options, f"compile:{index}", None) for index in range(len(SPECIALISED + PLAIN))]
        loaded = [
            folder
            for version, (folder, process) in tries.items()
            if not finish(process, 40, f"import {version}")
        ]
        warmers = [start(options, f"warm:{i}", loaded[0]) for i in range(WARMERS)] if loaded else []
        for compiler in compilers:
            finish(compiler, min(left(), 40), "compile")
        finish(start(options, "peaks", None), min(left(), 40), "peaks")
        for part in ("scaled_mm", "specialised"):
            finish(start(options, part, None), min(left(), 45), part)
        for warmer in warmers:
            finish(warmer, left() - 25, "warm")
        if loaded:
            finish(start(options, "deepgemm", loaded[0]), min(left(), 45), "deepgemm")
        finish(start(options, "plain", None), left(), "plain")


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "all":
        run_all(options)
    else:
        PARTS[options.part.split(":")[0]](options)


if __name__ == "__main__":
    main()
