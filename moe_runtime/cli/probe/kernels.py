"""Rates of one process on one core, as `planner/hardware` wants them: what a plan takes for a kernel's speed.

Every figure is the median over as many calls as fit `_SECONDS`, after some that are not counted. All ranks
measure the same at the same time, so that cores compete for memory and clock as they do in a run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SECONDS, _LEAST_CALLS = 0.04, 7
_INNER = (32, 64, 128, 256, 512, 1024)
_TOKENS, _OUTER = 512, 256
_GROUP_ROWS = 128
_HEADS, _WIDTH = 8, 48
_SEQUENCES = (64, 128, 256, 512, 1024)
_COPY_ROWS, _COPY_WIDTH = 1024, 256


def seconds_of(run: Callable[[], object]) -> float:
    """Median seconds of a call."""
    for _ in range(3):
        run()
    taken: list[float] = []
    until = time.perf_counter() + _SECONDS
    while time.perf_counter() < until or len(taken) < _LEAST_CALLS:
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def product_rates() -> dict[str, dict[int, float]]:
    """Operations a second in FP32 over the terms of a sum, by what the cluster file calls a product."""
    return {
        "dense": {inner: _forward(_TOKENS, inner) for inner in _INNER},
        "groups": {inner: _forward(_GROUP_ROWS, inner) for inner in _INNER},
        "weight": {rows: _weight(rows) for rows in _INNER},
    }


def _forward(rows: int, inner: int) -> float:
    left, right = torch.randn(rows, inner), torch.randn(_OUTER, inner)
    out = torch.empty(rows, _OUTER)
    return 2 * rows * inner * _OUTER / seconds_of(lambda: torch.mm(left, right.t(), out=out))


def _weight(rows: int) -> float:
    left, right, total = torch.randn(rows, _OUTER), torch.randn(rows, _OUTER), torch.zeros(_OUTER, _OUTER)
    return 2 * rows * _OUTER**2 / seconds_of(lambda: total.addmm_(left.t(), right))


def attention_rates() -> dict[str, dict[int, float]]:
    """Operations of the causal triangle a second, forward and backward, over the length of a sequence."""
    both = {length: _attention(length) for length in _SEQUENCES}
    return {
        "forward": {length: rates[0] for length, rates in both.items()},
        "backward": {length: rates[1] for length, rates in both.items()},
    }


def _attention(length: int) -> tuple[float, float]:
    shape = (max(1, _TOKENS // length), _HEADS, length, _WIDTH)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def run() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    out = run()
    grad = torch.randn_like(out)
    pairs = shape[0] * length * (length + 1) / 2 * _HEADS
    with torch.no_grad():
        forward_s = seconds_of(run)
    backward_s = seconds_of(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    return 2 * pairs * 2 * _WIDTH / forward_s, 2 * pairs * 5 * _WIDTH / backward_s


def copy_rate() -> float:
    """Bytes a second, read and written together, of rows put into another order in new memory."""
    rows = torch.randn(_COPY_ROWS, _COPY_WIDTH)
    order = torch.randperm(_COPY_ROWS)
    return 2 * 4 * rows.numel() / seconds_of(lambda: rows.index_select(0, order))


def measure_kernels() -> dict[str, Any]:
    """Everything that one process can say without the others."""
    return {"products": product_rates(), "attention": attention_rates(), "copy": copy_rate()}
