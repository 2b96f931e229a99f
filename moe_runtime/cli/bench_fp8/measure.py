"""One shape measured: every back end checked on poisoned outputs, then timed beside BF16."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from moe_runtime.cli.bench_fp8.cases import Operands, Shape, fp8_call, groups_of, plain_call, sets_of
from moe_runtime.cli.bench_fp8.clock import device_seconds, host_seconds
from moe_runtime.fp8.difference import difference
from moe_runtime.fp8.gemm_choice import cannot_run, module_of
from moe_runtime.fp8.tiled import Groups

WORST_DIFFERENCE = 1e-3


def measure_shape(
    shape: Shape, device: torch.device, backends: Sequence[str], repeats: int = 20, **options: Any
) -> dict[str, Any]:
    """A line of the result: TFLOP/s by back end and of BF16, differences, and what went wrong.

    Args:
        backends: names; those that cannot run are listed with their reason.
        options: passed on to the back end (a plan of the Triton kernel).
    """
    groups = groups_of(shape, device) if shape.counts else None
    sets = sets_of(shape, device)
    clock = device_seconds if device.type == "cuda" else host_seconds
    plain = [plain_call(shape, groups, x) for x in sets]
    exact = plain[0]()
    line: dict[str, Any] = {
        "shape": shape.name, "role": shape.role, "m": shape.m, "n": shape.n, "k": shape.k,
        "groups": len(shape.counts), "ragged": len(set(shape.counts)) > 1,
        "tflops": {}, "difference": {}, "failed": {},
    }  # fmt: skip
    line["tflops"]["bf16"] = _tflops(shape, clock(plain, repeats))
    for name in backends:
        reason = cannot_run(name, device)
        if reason:
            line["failed"][name] = f"cannot run: expected {reason}"
            continue
        try:
            found = check(shape, groups, sets[0], exact, name, options)
            line["difference"][name] = found
            if found < WORST_DIFFERENCE:
                adds = "wgrad" in shape.role
                calls = [fp8_call(shape, groups, x, module_of(name), adds, **options) for x in sets]
                line["tflops"][name] = _tflops(shape, clock(calls, repeats))
            else:
                line["failed"][name] = f"difference {found:.2e}"
        except Exception as error:  # a table with a hole says more than none
            line["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    return line


def check(
    shape: Shape, groups: Groups | None, x: Operands, exact: Any, name: str, options: dict[str, Any]
) -> float:
    """The difference to BF16 operands' product; where gradients are added, of both ways, the worse."""
    x.out.fill_(torch.nan)
    fp8_call(shape, groups, x, module_of(name), False, **options)()
    found = [difference(exact, x.out)]
    if "wgrad" in shape.role:
        x.out.copy_(exact)
        fp8_call(shape, groups, x, module_of(name), True, **options)()
        found.append(difference(exact.float() * 2, x.out))
    return 1.0 if any(math.isnan(value) for value in found) else max(found)


def _tflops(shape: Shape, seconds: float) -> float:
    return round(shape.flops / seconds / 1e12, 5)
