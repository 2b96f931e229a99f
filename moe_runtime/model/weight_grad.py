"""How a weight gradient leaves a backward function: to autograd, or to the weight's sink.

A weight may carry a `grad_sink` (set from outside, by whoever accumulates gradients in FP32 or defers
them). Then backward hands the sink a closure that adds the gradient to a buffer, and tells autograd
nothing. The sink runs it at once or, where the closure says that it may be deferred, later.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# write(out, accumulate): out = gradient, or out += gradient; out may be wider than the weight.
Write = Callable[[Tensor, bool], None]


def deliver(
    weight: Tensor, write: Write, deferrable: bool = True, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Give a weight gradient to the weight's sink, or return it for autograd.

    Args:
        weight: the parameter, whose `grad_sink(weight, accumulate, deferrable)` is used if it has one.
        write: writes or accumulates the gradient, shaped as `weight`, into a tensor of at least FP32.
        deferrable: whether the sink may run it after this backward.
        dtype: what `write` needs to write into when there is no sink; default: the weight's.

    Returns:
        The gradient in the weight's dtype, or None if the sink took it.
    """
    sink = getattr(weight, "grad_sink", None)
    if sink is not None:
        sink(weight, lambda buffer: write(buffer, True), deferrable)
        return None
    grad = torch.empty_like(weight, dtype=dtype or weight.dtype)
    write(grad, False)
    return grad.to(weight.dtype)
