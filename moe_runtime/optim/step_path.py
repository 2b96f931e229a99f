"""Which implementation takes the step: plain tensors, compiled C++ on the CPU, Triton on CUDA.

    path       FP8 and BF16 moments of float32 parameters
    auto       fused where it can be had; where not, eager, and a line in the log says so once
    eager      plain tensor operations
    compiled   fused; an error where it cannot be had

All give the same bits, so a path may change between two steps. FP32 moments and float64 parameters have no
fused form of ours: the first have torch's, the second are for tests.
"""

import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.optim.compiled_step import bf16_step, fp8_step, open_library
from moe_runtime.optim.moments import MomentStorage
from moe_runtime.optim.native_build import BuildError

PATHS = ("auto", "eager", "compiled")
ENVIRONMENT = "MOE_RUNTIME_STEP_PATH"
FusedStep = Callable[..., None]
_log = logging.getLogger(__name__)


def checked_path(path: str) -> str:
    """`path`, or what the environment says instead of auto.

    Raises:
        ConfigError: another name.
    """
    told = os.environ.get(ENVIRONMENT) if path == "auto" else None
    chosen, where = (told, ENVIRONMENT) if told else (path, "optim: step_path")
    if chosen not in PATHS:
        raise ConfigError(f"{where}: expected {', '.join(PATHS[:-1])} or {PATHS[-1]}, got {chosen!r}")
    return chosen


def fused_step_for(path: str, storage: MomentStorage, param: Tensor) -> FusedStep | None:
    """A function (value, grad, state, factors, noise, counters=...), or None for the eager form.

    Raises:
        ConfigError: `path` is compiled and there is no such form here.
    """
    if path == "eager" or param.dtype != torch.float32:
        return None
    step, reason = _open(param.device.type, storage.kind)
    if step is None and path == "compiled":
        raise ConfigError(
            f"optim: expected a compiled step for {storage.kind} moments on {param.device.type}, "
            f"got none: {reason}; use the step path auto or eager"
        )
    return step


@cache
def _open(device: str, kind: str) -> tuple[FusedStep | None, str]:
    """The fused form, or None and why; asked once for each device and storage, and told once."""
    found = _triton_form(kind) if device == "cuda" else _compiled_form(device, kind)
    if isinstance(found, str):
        _log.warning("optim: the step with %s moments on %s is the plain one: %s", kind, device, found)
        return None, found
    _log.info("optim: the step with %s moments on %s is fused", kind, device)
    return found, ""


def _triton_form(kind: str) -> FusedStep | str:
    try:
        from moe_runtime.optim import bf16_step_triton, fused_step_triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return {"fp8": fused_step_triton.fused_step, "bf16": bf16_step_triton.bf16_step}[kind]


def _compiled_form(device: str, kind: str) -> FusedStep | str:
    if device != "cpu":
        return "fused forms are written for cpu and cuda"
    try:
        open_library()
    except BuildError as error:
        return str(error)
    return {"fp8": fp8_step, "bf16": bf16_step}[kind]
