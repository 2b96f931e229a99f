"""The whole measurement on one device: peaks, every shape, and the table that `gemm_choice` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_runtime.cli.bench_fp8.cases import Shape, gpu_shapes
from moe_runtime.cli.bench_fp8.clock import peaks
from moe_runtime.cli.bench_fp8.measure import measure_shape
from moe_runtime.errors import ConfigError
from moe_runtime.fp8.gemm_choice import BACKENDS, ROLES, TABLE, device_name

_COUNTS = (96, 0, 160, 64)
CPU_SHAPES = [
    Shape("dense", 256, 512, 512),
    Shape("wgrad", 512, 512, 256),
    Shape("groups", sum(_COUNTS), 512, 512, _COUNTS),
    Shape("wgrad_groups", 512, 512, sum(_COUNTS), _COUNTS),
]
FAST = tuple(name for name in BACKENDS if name != "reference")


def measure(device: str, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all shapes; each line is reported as it comes.

    Args:
        device: `cpu`: the emulation against BF16, small shapes; `cuda`: every back end at the shapes of V3.

    Raises:
        ConfigError: no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench fp8: expected a CUDA device, found none; use --device cpu")
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    result: dict[str, Any] = {"device": device_name(where), "torch": torch.__version__, "lines": []}
    if on_gpu:
        result["peaks"] = peaks()
    shapes, backends = (gpu_shapes(), FAST) if on_gpu else (CPU_SHAPES, ("reference",))
    for shape in shapes:
        line = measure_shape(shape, where, backends)
        result["lines"].append(line)
        report(line)
        if on_gpu:
            torch.cuda.empty_cache()
    return result


def write_table(result: dict[str, Any], path: Path = TABLE) -> None:
    """Replace one device's measurements in the table; of groups the ragged ones, which training has.

    Raises:
        ConfigError: nothing fast was measured.
    """
    lines = {
        role: [
            {name: line[name] for name in ("m", "n", "k", "groups", "tflops")}
            for line in result["lines"]
            if line["role"] == role
            and set(line["tflops"]) & set(FAST)
            and (line["ragged"] or "groups" not in role)
        ]
        for role in ROLES
    }
    if not any(lines.values()):
        raise ConfigError("bench fp8 --write-table: expected a device where a fast back end runs, found none")
    table = json.loads(path.read_text())
    table["devices"][result["device"]] = {"torch": result["torch"], "peaks": result["peaks"], **lines}
    path.write_text(json.dumps(table, indent=1) + "\n")


def describe(line: dict[str, Any]) -> str:
    """A line for reading: TFLOP/s of BF16, then of each back end with its ratio to BF16, then what failed."""
    plain = line["tflops"]["bf16"]
    parts = [
        f"{name} {speed:,.4g} ({speed / plain:.2f}x, difference {line['difference'][name]:.1e})"
        for name, speed in line["tflops"].items()
        if name != "bf16"
    ]
    parts += [f"{name}: {reason}" for name, reason in line["failed"].items()]
    return f"{line['shape']:>44}  bf16 {plain:,.4g} TFLOP/s; " + "; ".join(parts)
