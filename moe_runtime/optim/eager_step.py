"""The step in plain tensor operations, window by window: the definition the fused forms are tested against.

A window's temporaries stay bounded, and the many passes of decoding and encoding find them in the cache.
FP32 moments need neither: torch's own fused kernel reads and writes them in one pass already, and takes
the whole tensor at once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from moe_runtime.optim.moments import BLOCK, MEAN, SQUARE, MomentStorage, Noise, State
from moe_runtime.optim.statistics import count_eagerly
from moe_runtime.optim.update import Factors, update

# Elements worked on at a time. CPU: a window's temporaries stay in the second-level cache (measured: half
# and twice this are slower). Other devices: few launches, and 64 MiB of temporaries.
WINDOW_CPU, WINDOW_DEVICE = 1024 * BLOCK, 16384 * BLOCK


def eager_step(
    value: Tensor,
    grad: Tensor,
    storage: MomentStorage,
    state: State,
    factors: Factors,
    noise: Noise,
    counters: Tensor | None = None,
) -> None:
    """One step in place.

    Args:
        value: [n] float32 or float64, contiguous.
        grad: [n] of any floating type.
        state: of `storage` for n elements.
        counters: see `statistics`; only FP8 moments are counted.
    """
    for start, stop in windows(value):
        mean, square = (moment.to(value.dtype) for moment in storage.read(state, start, stop))
        before = None if counters is None else square.clone()
        quotient = update(value[start:stop], grad[start:stop].to(value.dtype), mean, square, factors)
        if counters is None or before is None:
            storage.write(state, start, mean, square, noise)
        else:
            storage.write(state, start, mean, square, noise)
            count_eagerly(counters, state, start, before, square, quotient)


def torch_step(value: Tensor, grad: Tensor, state: State, group: dict[str, Any], step: int) -> None:
    """One step with moments of the parameter's own type, by torch's one-pass kernel, in place.

    Args:
        value: [n] float32 or float64, contiguous.
        state: of FullMoments for n elements.
        group: with lr, betas, eps, weight_decay.
        step: counted from 1.
    """
    torch_adamw(
        [value],
        [grad.to(value.dtype)],
        [state[MEAN].view(-1)],
        [state[SQUARE].view(-1)],
        [],
        [torch.tensor(float(step - 1), device=value.device)],  # the kernel counts it up
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


def windows(value: Tensor) -> Iterable[tuple[int, int]]:
    """Ranges that cover the flattened tensor; every start is a multiple of BLOCK."""
    size = WINDOW_CPU if value.device.type == "cpu" else WINDOW_DEVICE
    return ((start, min(start + size, value.numel())) for start in range(0, value.numel(), size))
