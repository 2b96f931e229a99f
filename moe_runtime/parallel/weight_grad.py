"""Where weight gradients go: into the FP32 accumulator, now or when the schedule says W.

A linear's backward has two halves that need each other not at all: the input gradient, for which the
previous stage waits, and the weight gradient, for which nobody waits until the optimizer. Our linear
Functions hand the second half over as a closure. The sink runs it at once, or keeps it in the
collection that is open; a W action runs one collection.

Accumulating in closure order makes deferral exact: within one parameter the order of microbatches
does not change, so deferred and undeferred gradients are the same bits. Nothing here touches the
autograd graph, so no graph is retained.

Norm gains and the router come through plain autograd; a hook moves them from `.grad` to the
accumulator.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

WeightGrads = list[Callable[[], None]]


def accumulator_dtype(param: Parameter) -> torch.dtype:
    """FP32, or FP64 for an FP64 parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def ensure_accumulator(param: Parameter) -> Tensor:
    """The parameter's accumulator; made of zeros when there is none."""
    buffer = getattr(param, "grad_accum", None)
    if buffer is None:
        buffer = torch.zeros_like(param, dtype=accumulator_dtype(param))
        param.grad_accum = buffer  # type: ignore[attr-defined]
    return buffer


class WeightGradSink:
    """Receives weight gradients from the backward passes of one rank."""

    def __init__(self) -> None:
        self._open: WeightGrads | None = None

    def install(self, params: Iterable[Parameter]) -> None:
        """Make this the sink of `params`; their `.grad` stays None from now on."""
        for param in params:
            param.grad_sink = self  # type: ignore[attr-defined]
            param.register_post_accumulate_grad_hook(_move_to_accumulator)

    def __call__(self, weight: Parameter, accumulate: Callable[[Tensor], None], deferrable: bool) -> None:
        def run() -> None:
            with torch.no_grad():
                accumulate(ensure_accumulator(weight))

        if deferrable and self._open is not None:
            self._open.append(run)
        else:
            run()

    @contextmanager
    def collect(self, into: WeightGrads | None) -> Iterator[None]:
        """Keep deferrable weight gradients in `into` meanwhile; None runs them at once."""
        before, self._open = self._open, into
        try:
            yield
        finally:
            self._open = before


def run_weight_grads(items: WeightGrads) -> None:
    """Run and drop the collected weight gradients, oldest first."""
    for item in items:
        item()
    items.clear()


def _move_to_accumulator(param: Tensor) -> None:
    if param.grad is None:  # its Function gave the gradient to the sink; autograd calls the hook anyway
        return
    assert isinstance(param, Parameter)
    ensure_accumulator(param).add_(param.grad)
    param.grad = None
