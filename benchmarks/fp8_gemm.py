"""Which plans of the Triton kernel are worth having, and how often DeepGEMM compiles, on one GPU.

    PYTHONPATH=.:comm python3 benchmarks/fp8_gemm.py --out FOLDER [--seconds 45] [--part NAME]

Each part is a process of its own with a limit, so that one that hangs or breaks costs its own lines only;
lines are written as they come, to FOLDER/<part>.jsonl. `--part prepare` alone compiles the kernels of
DeepGEMM for the shapes of `bench fp8`, by several processes, and counts those for changing counts of rows.
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
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_fp8.cases import Shape, gpu_shapes, ragged

SWEPT = [
    Shape("dense", 4096, 4096, 7168),
    Shape("dense", 8192, 7168, 16384),
    Shape("groups", sum(ragged(32, 1024)), 4096, 7168, ragged(32, 1024)),
    Shape("groups", sum(ragged(32, 1024)), 7168, 2048, ragged(32, 1024)),
    Shape("groups", sum(ragged(8, 4096)), 4096, 7168, ragged(8, 4096)),
    Shape("wgrad", 4096, 7168, 8192),
    Shape("wgrad_groups", 4096, 7168, sum(ragged(8, 4096)), ragged(8, 4096)),
    Shape("wgrad_groups", 4096, 7168, sum(ragged(32, 1024)), ragged(32, 1024)),
]
PLANS = [(64, 128, 4, 3, 3, 8), (64, 128, 4, 3, 3, 16), (64, 128, 4, 3, 3, 32), (64, 128, 4, 3, 2, 16),
         (64, 128, 4, 3, 2, 32), (64, 128, 4, 4, 2, 8), (64, 128, 4, 4, 2, 16)]  # fmt: skip
WARMERS = 12
MANY_COUNTS = 40


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--part", default="all")
    return parser.parse_args()


def write(options: argparse.Namespace, line: dict[str, Any]) -> None:
    """A line of a part's results, at once on disk and on the screen."""
    text = json.dumps(line)
    with (options.out / f"{options.part.split(':')[0]}.jsonl").open("a") as file:
        file.write(text + "\n")
    print(options.part, text, flush=True)


def part_warm(options: argparse.Namespace) -> None:
    """Have DeepGEMM compile what some of the shapes need."""
    import torch

    from moe_runtime.cli.bench_fp8.cases import fp8_call, groups_of, make_operands
    from moe_runtime.fp8 import gemm_deepgemm

    device = torch.device("cuda")
    for shape in [*SWEPT, *gpu_shapes()][int(options.part.split(":")[1]) :: WARMERS]:
        begin = time.perf_counter()
        groups = groups_of(shape, device) if shape.counts else None
        try:
            x = make_operands(shape, device, 0)
            fp8_call(shape, groups, x, gemm_deepgemm, False)()
            torch.cuda.synchronize()
            found = "done"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:300]
        write(
            options, {"shape": shape.name, "result": found, "seconds": round(time.perf_counter() - begin, 1)}
        )
        torch.cuda.empty_cache()


def part_counts(options: argparse.Namespace) -> None:
    """How many kernels DeepGEMM compiles when counts change at every step, and how long a step waits."""
    import torch

    from moe_runtime.cli.bench_fp8.cases import fp8_call, groups_of, make_operands
    from moe_runtime.fp8 import gemm_deepgemm

    device, waits = torch.device("cuda"), []
    folder = Path(os.environ["DG_JIT_CACHE_DIR"])
    for step in range(MANY_COUNTS):
        counts = ragged(32, 1024, seed=step + 100)
        shape = Shape("groups", sum(counts), 2048, 512, counts)
        x, groups = make_operands(shape, device, 0), groups_of(shape, device)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fp8_call(shape, groups, x, gemm_deepgemm, False)()
        torch.cuda.synchronize()
        waits.append(round(time.perf_counter() - begin, 3))
        compiled = len(list(folder.rglob("*.cubin")))
        if step % 10 == 9:
            write(options, {"steps": step + 1, "kernels": compiled, "longest": sorted(waits)[-3:]})


def plans() -> list[Any]:
    """All plans of the sweep."""
    from moe_runtime.fp8.gemm_triton import Plan

    return [Plan(m, n, warps, stages, programs, band) for m, n, warps, stages, programs, band in PLANS]


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
            try:
                line = measure_shape(shape, torch.device("cuda"), ["triton"], 12, plan=plan)
            except Exception as error:
                line = {"shape": shape.name, "failed": f"{type(error).__name__}: {error}"[:300]}
            write(options, {"plan": dataclasses.asdict(plan), **line})
        torch.cuda.empty_cache()


PARTS = {
    "prepare": lambda options: part_prepare(options),
    "warm": part_warm,
    "counts": part_counts,
    "plans": part_plans,
    "compile": part_compile,
}


def start(options: argparse.Namespace, part: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--out", str(options.out), "--part", part]
    return subprocess.Popen(command, env=os.environ | environment)


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


def part_prepare(options: argparse.Namespace) -> None:
    """Compile all kernels of the other parts, and count those for changing counts."""
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        parts = [*(f"compile:{i}" for i in range(len(PLANS))), *(f"warm:{i}" for i in range(WARMERS))]
        running = {part: start(options, part) for part in parts}
        running["counts"] = start(options, "counts", DG_JIT_CACHE_DIR=folder)
        for part, process in running.items():
            finish(process, end - time.monotonic(), part)


def run_all(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    part_prepare(options)
    finish(start(options, "plans"), options.seconds - (time.monotonic() - begin), "plans")


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "all":
        run_all(options)
    else:
        PARTS[options.part.split(":")[0]](options)


if __name__ == "__main__":
    main()
