"""What a rank says when its memory ends: what it asked for, what it holds against the plan, what would help.

The plan is the planner's, by kind. What the states hold is read off the tensors themselves; all else of the
process (activations, buffers, libraries) is the rest. The two differing in one kind shows where to look.
"""

import re
import traceback
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from moe_runtime.config.schema import RunConfig
from moe_runtime.optim.moments import STEP
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.planner.reckon.memory import Memory, rank_memory
from moe_runtime.schedule.action import Program

_SIGNS = ("can't allocate memory", "out of memory", "cannot allocate memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_STATES = ("weights", "gradients", "masters", "moments")


def is_memory_end(error: BaseException) -> bool:
    """Whether an error, or what it came from, is a request for memory that was refused."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen).lower() for sign in _SIGNS):
            return True
        seen = seen.__cause__
    return False


def explain_memory_end(
    error: BaseException, runtime: Runtime, optimizer: ZeroOptimizer, program: Program | None
) -> str:
    """One line for the user.

    Args:
        error: what was raised; its frames, and with them the activations, are let go.
        program: of the step; None before the first, when there is nothing to reckon activations by.
    """
    asked, place = _asked(error), runtime.clock.progress
    used = _process_bytes(runtime.device)
    held = held_bytes(runtime, optimizer)
    traceback.clear_frames(error.__traceback__)
    number = place.step and f"step {place.step}"
    where = ", ".join(str(word) for word in (number, place.phase, place.entry, place.part) if word)
    wanted = f"asked for {_mib(asked)} more" if asked else "asked for more"
    if program is None:
        return f"memory ended in {where}: {wanted}; the states alone hold {_mib(sum(held.values()))}"
    plan = rank_memory(runtime.config, runtime.layout, program, runtime.mesh.pp_rank)
    kinds = [f"{kind} {_mib(held[kind])} (planned {_mib(getattr(plan, kind))})" for kind in _STATES]
    running = f"all else {_mib(used - sum(held.values()))} (planned {_mib(plan.running)} for activations, "
    kinds.append(f"{running}workspace and buffers)")
    first, second = suggestions(runtime.config, plan)
    return f"memory ended in {where}: {wanted}; holds {', '.join(kinds)}; try {first}, or {second}"


def held_bytes(runtime: Runtime, optimizer: ZeroOptimizer) -> dict[str, int]:
    """Bytes of the states of this rank, by kind as the planner names them."""
    params = [param for _, param in runtime.named_params]
    buffers = [buffer for chunk in runtime.chunks.values() for buffer in chunk.buffers()]
    masters = [partition.master for partition in optimizer.partitions()]
    states = [optimizer.client.state.get(master, {}) for master in masters]
    moments = [value for state in states for name, value in state.items() if name != STEP]
    gradients = [param.grad_accum for param in params if hasattr(param, "grad_accum")]
    kinds: dict[str, Iterable[Tensor]] = dict(
        zip(_STATES, ([*params, *buffers], gradients, masters, moments), strict=True)
    )
    return {kind: _nbytes(tensors) for kind, tensors in kinds.items()}


def suggestions(config: RunConfig, plan: Memory) -> tuple[str, str]:
    """The first two that this run has not taken yet, those first that act on the larger part of the plan."""
    recompute = [name for name, is_on in config.recompute.model_dump().items() if is_on is False]
    activations = [
        ("batch.micro_batch_size=1", config.batch.micro_batch_size > 1),
        (" ".join(f"recompute.{name}=true" for name in recompute), bool(recompute)),
        (f"batch.seq_len={config.batch.seq_len // 2}", config.batch.seq_len > 1),
    ]
    states = [
        ("optim.moments=fp8", config.optim.moments != "fp8"),
        (f"layout.dp={2 * config.layout.dp} on twice the machines", True),
        (f"layout.pp={2 * config.layout.pp} on twice the machines", True),
    ]
    ordered = [*activations, *states] if plan.running > plan.states else [*states, *activations]
    first, second, *_ = [text for text, applies in ordered if applies]
    return first, second


def _asked(error: BaseException) -> int:
    """Bytes of the request; 0 where the error does not say."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _process_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
