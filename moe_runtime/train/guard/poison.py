"""Spoils one number of a rank on purpose: what the fault injector does to gradients, weights and state.

Always the least that can go wrong: one element is not finite, or one bit turns over, the lowest of its
element, which no loss curve would ever show.

When to strike. A gradient exists from the first backward of a step on and is taken up when the phase
`optimizer` has begun, so that mark is the moment for `grad`. Weights and optimizer state can be struck at
any mark; between two steps they are at rest.
"""

import torch
from torch import Tensor

from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.parallel.zero_partition import Partition

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = {"nan": float("nan"), "inf": float("inf")}
KINDS = (*_VALUES, "flip")
TARGETS = ("grad", "param", "optimizer")


def poison(runtime: Runtime, optimizer: ZeroOptimizer, kind: str, target: str) -> str:
    """Spoil one element of the largest tensor of its kind; gives its name and place.

    Args:
        kind: `nan` or `inf` (one element becomes it) or `flip` (its lowest bit turns over).
        target: `grad`, `param` or `optimizer`, whose FP32 master is struck.

    Raises:
        ValueError: no such kind or target.
    """
    if kind not in KINDS or target not in TARGETS:
        raise ValueError(f"expected one of {KINDS} and of {TARGETS}, got {kind} and {target}")
    name, flat = _victim(runtime, optimizer, target)
    place = flat.numel() // 2
    with torch.no_grad():
        if kind == "flip":
            flat.view(_WORDS[flat.element_size()])[place] ^= 1
        else:
            flat[place] = _VALUES[kind]
    return f"{name}[{place}]"  # of the part that is here


def _victim(runtime: Runtime, optimizer: ZeroOptimizer, target: str) -> tuple[str, Tensor]:
    """The name of a tensor and its elements, flat, live."""
    if target == "optimizer":
        partition = max(optimizer.partitions(), key=_elements)
        piece = max(partition.pieces(), key=lambda piece: piece.numel)
        return piece.name, partition.master.detach().narrow(0, piece.local, piece.numel)
    if target == "param":
        name, param = max(runtime.named_params, key=lambda named: named[1].numel())
        return name, param.detach().view(-1)
    largest = max(optimizer.gradients(), key=lambda part: part.flat.numel())
    return largest.name, largest.flat


def _elements(partition: Partition) -> int:
    """Elements that are not padding."""
    return sum(piece.numel for piece in partition.pieces())
