"""Bandwidth of the FP8 casts on a GPU, against a copy timed in the same run.

    PYTHONPATH=.:comm python benchmarks/fp8_casts.py [--sweep] [--rows 8192] [--hidden 7168]

Prints one JSON object, then a table. Each cast first has to give the bits of plain torch forms on the same
device (joined forms: of a cast of values made by torch, but for elements next to a tie); then all of them and
a copy are timed in turn, `--repeats` rounds, and the median counts. A cast's bandwidth is the bytes it cannot
avoid (each input read once, each output written once, scales too) over its time; `fraction` is that over the
copy's. A kernel that fails is reported and the others go on. `--sweep` times other sizes of programs too.

Exit codes: 0; 1 where bits differ or a kernel failed; 2 without a CUDA device.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import fp8_cast_checks
from moe_runtime.fp8.tiled import Groups, Tiles

COPY_BYTES = 1 << 30
WARM_UP_ROUNDS = 3
COVER_BYTES = 512 << 20


@dataclass(frozen=True)
class Task:
    """Something to time: `run` does it once and has to move `moved_bytes` at least."""

    run: Callable[[], object]
    moved_bytes: int


@dataclass(frozen=True)
class Inputs:
    """Tensors of one run; `groups` share out the rows of x, `gated_groups` those of gate_up."""

    x: Tensor
    tiles: Tiles
    groups: Groups
    gate_up: Tensor
    gate_up_tiles: Tiles
    gated_groups: Groups
    d_product: Tensor
    row_weights: Tensor
    gain: Tensor


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--gated-rows", type=int, default=16384)
    parser.add_argument("--gated-width", type=int, default=4096, help="2f")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", action="append", default=[], help="a cast to time; all without")
    return parser.parse_args(arguments)


def ragged_groups(rows: int, groups: int, generator: torch.Generator, device: torch.device) -> Groups:
    """Random counts that sum to `rows`, the first group without any."""
    owners = torch.randint(min(1, groups - 1), groups, (rows,), generator=generator)
    return Groups(torch.bincount(owners, minlength=groups), device)


def make_inputs(options: argparse.Namespace, device: torch.device) -> Inputs:
    """Random values."""
    from moe_runtime.fp8 import cast_triton

    generator = torch.Generator(device).manual_seed(options.seed)
    host = torch.Generator().manual_seed(options.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x = random(options.rows, options.hidden)
    gate_up = random(options.gated_rows, options.gated_width)
    return Inputs(
        x=x,
        tiles=cast_triton.cast_rows_on_device(x),
        groups=ragged_groups(options.rows, options.groups, host, device),
        gate_up=gate_up,
        gate_up_tiles=cast_triton.cast_rows_on_device(gate_up),
        gated_groups=ragged_groups(options.gated_rows, options.groups, host, device),
        d_product=random(options.gated_rows, options.gated_width // 2),
        row_weights=torch.rand(options.gated_rows, generator=generator, device=device),
        gain=random(options.hidden).float(),
    )


Plan = tuple[Callable[..., object], int, list[dict[str, Any]]]  # runs with options; bytes; options to sweep


def plain_plans(i: Inputs) -> dict[str, Plan]:
    """Casts of activations and weights alone."""
    from moe_runtime.fp8 import cast_triton as c

    x_bytes, code_bytes = i.x.nbytes, i.tiles.nbytes
    padded = code_bytes * i.groups.num_padded // i.x.shape[0]
    integer, warps = {"hardware_cast": False}, [{"num_warps": 2}]
    return {
        "rows": (
            lambda **o: c.cast_rows_on_device(i.x, **o),
            x_bytes + code_bytes,
            [integer, *grid("rows", (16, 4), (64, 4), (64, 8))],
        ),
        "columns": (
            lambda **o: c.cast_columns_on_device(i.x, i.groups, **o),
            x_bytes + padded,
            [*grid("columns", (64, 4), (128, 4)), *capped(80)],
        ),
        "both": (
            lambda **o: c.cast_both_on_device(i.x, i.groups, **o),
            x_bytes + code_bytes + padded,
            capped(128),
        ),
        "columns_of": (
            lambda **o: c.columns_of_on_device(i.tiles, i.groups, **o),
            code_bytes + padded,
            [
                *grid("columns", (64, 4), (128, 4)),
            ],
        ),
        "normed": (
            lambda **o: c.cast_normed_on_device(i.x, i.gain, 1e-6, **o),
            2 * x_bytes + code_bytes,
            [{"num_warps": 4}],
        ),
        "weight": (lambda **o: c.cast_weight_on_device(i.x, **o), x_bytes + i.x.numel(), warps),
        "weight_both": (
            lambda **o: c.cast_weight_both_on_device(i.x, **o),
            x_bytes + 2 * i.x.numel(),
            warps,
        ),
        "decode": (lambda **o: c.decode_on_device(i.tiles, torch.bfloat16, **o), x_bytes + code_bytes, []),
    }


def gated_plans(i: Inputs) -> dict[str, Plan]:
    """Casts joined with SwiGLU."""
    from moe_runtime.fp8 import cast_triton as c

    wide_codes = i.gate_up_tiles.nbytes
    wide_padded = wide_codes * i.gated_groups.num_padded // i.gate_up.shape[0]
    cached = (i.gate_up_tiles, i.row_weights, i.gated_groups)
    return {
        "gated": (
            lambda **o: c.cast_gated_on_device(i.gate_up, i.row_weights, **o),
            i.gate_up.nbytes + wide_codes // 2,
            grid("rows", (32, 4), (128, 8)),
        ),
        "gated_tiles": (
            lambda **o: c.cast_gated_tiles_on_device(*cached, **o),
            wide_codes + wide_padded // 2,
            [*grid("columns", (32, 2), (64, 2)), *capped(80)],
        ),
        "gated_backward": (
            lambda **o: c.gated_backward_cast_on_device(i.d_product, *cached, **o),
            i.d_product.nbytes + 2 * wide_codes + wide_padded,
            capped(96),
        ),
    }


def make_tasks(inputs: Inputs, sweep: bool, only: list[str]) -> dict[str, Task]:
    """What is timed, by name; with `sweep` in other shapes of programs too."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=inputs.x.device)
    target = torch.empty_like(source)
    tasks = {"copy": Task(lambda: target.copy_(source), 2 * COPY_BYTES)}
    for name, (run, moved, others) in (plain_plans(inputs) | gated_plans(inputs)).items():
        if only and name not in only:
            continue
        for chosen in ({}, *(others if sweep else [])):
            title = name + "".join(f" {key}={value}" for key, value in chosen.items())
            tasks[title] = Task(partial(run, **chosen), moved)
    return tasks


def grid(name: str, *pairs: tuple[int, int]) -> list[dict[str, Any]]:
    """Options for pairs of a size and a number of warps."""
    return [{name: size, "num_warps": warps} for size, warps in pairs]


def capped(*registers: int | None) -> list[dict[str, Any]]:
    """Options for bounds on the registers of a thread."""
    return [{"max_registers": bound} for bound in registers]


def time_in_turn(tasks: dict[str, Task], repeats: int, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each task, the tasks taking turns; what fails is noted and left out.

    The device is busy with a copy while a task is launched, so that its time is free of the host's, and
    what the task reads is no longer in L2.
    """
    cover = torch.empty(2, COVER_BYTES, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARM_UP_ROUNDS + repeats):
        for name, task in tasks.items():
            if name in failed:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            try:
                cover[0].copy_(cover[1])
                begin.record()
                task.run()
                end.record()
                end.synchronize()
            except Exception as error:
                failed[name] = repr(error)[:300]
                continue
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items() if times}


def report(tasks: dict[str, Task], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Bytes, time, rate and fraction of each."""
    rates = {name: tasks[name].moved_bytes / time for name, time in seconds.items()}
    return {
        name: {
            "bytes": tasks[name].moved_bytes,
            "time_us": round(time * 1e6, 1),
            "gb_per_s": round(rates[name] / 1e9, 1),
            "fraction": round(rates[name] / rates["copy"], 3),
        }
        for name, time in seconds.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("fp8_casts: expected a CUDA device, found none; run it where there is a GPU", file=sys.stderr)
        return 2
    inputs = make_inputs(options, torch.device("cuda"))
    wrong = fp8_cast_checks.check_all(inputs.x, inputs.gain)
    failed: dict[str, str] = {}
    tasks = make_tasks(inputs, options.sweep, options.only)
    seconds = time_in_turn(tasks, options.repeats, failed)
    results = report(tasks, seconds)
    shape = {key: value for key, value in vars(options).items() if key not in ("sweep", "repeats", "only")}
    made = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": shape}
    print(json.dumps({**made, "wrong": wrong, "failed": failed, "results": results}))
    for name, row in results.items():
        print(f"{name:44s} {row['time_us']:9.1f} us {row['gb_per_s']:8.1f} GB/s {row['fraction']:6.3f}")
    for name, fault in (wrong | failed).items():
        print(f"WRONG {name}: {fault}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
