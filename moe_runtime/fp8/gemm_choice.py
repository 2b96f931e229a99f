"""Which back end computes a product: the fastest that was measured for such a shape on such a device.

`crossover.json` holds, for each device by name and each role, shapes with the TFLOP/s of every back end
(`moe-runtime bench fp8 --device cuda --write-table` makes it). A shape takes the line nearest to it in the
logarithms of m, n, k and the number of groups, and there the fastest of the back ends that run here: that is
known at the start, and one that does not is left out of every choice and named once in the log. Nothing else
is silent either: a back end asked for by name that cannot run raises; `auto` says once for each role and back
end what runs. A device without measurements takes those of a like one, or the order below, and the log says
which. Lines of groups are of ragged ones alone, which training has; equal ones are served by them.

Speeds are of FP8 only. Where BF16 was faster (weight gradients of groups on an H200) FP8 runs all the same:
BF16 would need operands that nobody keeps. `fp8.wgrad` turns FP8 off for a role.
"""

import json
import logging
import math
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from moe_runtime.errors import ConfigError

BACKENDS = ("reference", "scaled_mm", "triton", "deepgemm")
_FAST = ("deepgemm", "scaled_mm", "triton")
ROLES = ("dense", "wgrad", "groups", "wgrad_groups")
TABLE = Path(__file__).with_name("crossover.json")
# Where nothing was measured: the order on an H200.
_UNMEASURED = {
    "dense": ("deepgemm", "scaled_mm", "triton"),
    "wgrad": ("deepgemm", "scaled_mm", "triton"),
    "groups": ("deepgemm", "triton", "scaled_mm"),
    "wgrad_groups": ("deepgemm", "scaled_mm", "triton"),
}
# The same multiprocessors, other memory: products that wait for it may rank otherwise.
_LIKE = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}

_log = logging.getLogger("moe_runtime.fp8")
_used: dict[tuple[str, str], int] = {}


def backend_for(
    role: str, m: int, n: int, k: int, device: torch.device, wanted: str = "auto", *, groups: int = 0
) -> ModuleType:
    """The module that computes a product.

    Args:
        role: `dense`, `wgrad`, `groups` or `wgrad_groups`.
        m, n, k: rows and columns of the result and length of the sum; of all groups together where tokens
            are rows or are summed.
        wanted: `auto`, or the name of a back end.
        groups: how many; 0 for a product without. Many small ones rank otherwise than few large ones.

    Raises:
        ConfigError: no such back end, or it cannot run on this device.
    """
    if wanted == "auto":
        name = _choose(role, m, n, k, groups, device)
    else:
        name = wanted
        reason = cannot_run(name, device)
        if reason:
            raise ConfigError(f"FP8 products by {name}: expected {reason}; use another back end")
    if (role, name) not in _used:
        _log.info("FP8 products (%s): %s runs on %s", role, name, device_name(device))
    _used[role, name] = _used.get((role, name), 0) + 1
    return module_of(name)


def used() -> dict[str, dict[str, int]]:
    """How many products each back end computed so far, by role."""
    found: dict[str, dict[str, int]] = {}
    for (role, name), count in _used.items():
        found.setdefault(role, {})[name] = count
    return found


def cannot_run(name: str, device: torch.device) -> str | None:
    """What a back end expects that is not so here, as 'expected' goes on; None if it runs."""
    if name not in BACKENDS:
        raise ConfigError(f"FP8 products: expected a back end of {', '.join(BACKENDS)} or auto, got {name}")
    if name == "reference":
        return None
    try:
        reason: str | None = module_of(name).why_not(device)
    except ImportError as error:
        return f"triton, got {error}; install the extra gpu"
    return reason


def device_name(device: torch.device) -> str:
    """The name that measurements are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def module_of(name: str) -> ModuleType:
    """The module of a back end, imported when first needed."""
    return import_module(f"moe_runtime.fp8.gemm_{name}")


@cache
def _table() -> dict[str, Any]:
    devices: dict[str, Any] = json.loads(TABLE.read_text())["devices"]
    return devices


@lru_cache(maxsize=4096)
def _choose(role: str, m: int, n: int, k: int, groups: int, device: torch.device) -> str:
    """The name of the back end for `auto`; kept, since counts of rows come again."""
    if device.type == "cpu":
        return "reference"
    able = _able(device)
    name = device_name(device)
    if not able:
        told = "; ".join(f"{backend}: expected {cannot_run(backend, device)}" for backend in _FAST)
        raise ConfigError(
            f"FP8 products ({role}) on {name}: no fast back end runs ({told}); use BF16, or ask for reference"
        )
    lines = _lines(name, role)
    order = _fastest_first(lines, (m, n, k, groups)) if lines else list(_UNMEASURED[role])
    known = [backend for backend in order if backend in able]
    return known[0] if known else able[0]


@cache
def _able(device: torch.device) -> tuple[str, ...]:
    """The fast back ends that run on a device; the log names the others."""
    reasons = {backend: cannot_run(backend, device) for backend in _FAST}
    for backend, reason in reasons.items():
        if reason:
            _log.warning("FP8 products: %s is left out of the choice: expected %s", backend, reason)
    return tuple(backend for backend in _FAST if not reasons[backend])


@cache
def _lines(name: str, role: str) -> list[dict[str, Any]]:
    """The measurements for a role on a device or one like it; the log says whose."""
    table, like = _table(), _LIKE.get(name)
    lines: list[dict[str, Any]] = table.get(name, {}).get(role, [])
    if not lines and like:
        lines = table.get(like, {}).get(role, [])
        if lines:
            _say(f"FP8 products: nothing measured on {name}: back ends are chosen by the speeds of {like}")
    if not lines:
        order = ", ".join(_UNMEASURED[role])
        _say(f"FP8 products ({role}): nothing measured on {name}: {order}, in this order")
    return lines


@cache
def _say(message: str) -> None:
    """Log it, once."""
    _log.warning(message)


def _fastest_first(lines: list[dict[str, Any]], shape: tuple[int, int, int, int]) -> list[str]:
    """Back ends by their speed at the line nearest to a shape (m, n, k, groups)."""

    def distance(line: dict[str, Any]) -> float:
        measured = (line["m"], line["n"], line["k"], line["groups"])
        return sum(
            math.log(max(ours, 1) / max(theirs, 1)) ** 2 for ours, theirs in zip(shape, measured, strict=True)
        )

    speeds: dict[str, float] = min(lines, key=distance)["tflops"]
    return sorted((name for name in speeds if name in BACKENDS), key=lambda name: -speeds[name])
