"""Values of one microbatch in one stage, and the tape that its backward needs.

A phase is cut out of autograd's graph. Its floating inputs pass a gate: the value goes on, the gradient
stops there and is kept for the phase before. Its outputs are remembered by their edges in the graph,
not by their values. So the tape holds no tensor of its own: what stays alive between forward and
backward is what autograd, or a weight gradient to come, has saved, and nothing else.

Rejected: leaves that require grad, with `.grad` read off afterwards. A leaf keeps its value alive, needed
or not, and that of every phase's residual stream is not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_comm.wire.carried import carry_over
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from moe_runtime.model.phase import Phase
from moe_runtime.parallel.rounds import BlockInRounds
from moe_runtime.parallel.weight_grad import WeightGrads


@dataclass(frozen=True)
class Exit:
    """Where a gradient enters a phase's graph again.

    Args:
        edge: of the output.
        shape, dtype, device: of the output.
    """

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, output: Tensor) -> "Exit":
        return cls(get_gradient_edge(output), output.shape, output.dtype, output.device)


@dataclass
class Taped:
    """What the backward of a phase needs.

    Args:
        exits: output slot -> where its gradient goes in.
        grads: input slot -> gradient, filled by the phase's backward.
    """

    exits: dict[str, Exit] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Landed:
    """What the backward of a dispatch needs: the handle, and the shape of rows that got no gradient."""

    handle: Any
    rows_shape: torch.Size
    rows_dtype: torch.dtype
    weights_dtype: torch.dtype
    device: torch.device


class Started:
    """A communication under way; what it brings is stored when first needed.

    Args:
        wait: blocks until it is there.
        store: takes what it brought.
    """

    def __init__(self, wait: Callable[[], Any], store: Callable[[Any], None]) -> None:
        self._wait: Callable[[], Any] | None = wait
        self._store = store

    def finish(self) -> None:
        """Wait and store; further calls do nothing."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            self._store(wait())


@dataclass(eq=False)
class Flight:
    """Values of one microbatch in one stage.

    Args:
        state: slot -> value of the forward, each dropped after its last reader.
        grads: slot -> gradient, on the way back.
        token_shape: shape of the residual stream, [sequences, seq_len, hidden].
        scalars: (slot, layer, value) of every scalar put out.
        landed: of each dispatch, by layer.
        in_rounds: blocks, by layer, whose rows did not fit.
    """

    state: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)
    token_shape: torch.Size = field(default_factory=torch.Size)
    scalars: list[tuple[str, str, Tensor]] = field(default_factory=list)
    tape: dict[Phase, Taped] = field(default_factory=dict)
    weight_grads: WeightGrads = field(default_factory=list)
    started: dict[str, list[Started]] = field(default_factory=dict)
    landed: dict[str, Landed] = field(default_factory=dict)
    in_rounds: dict[str, BlockInRounds] = field(default_factory=dict)

    def add_grad(self, slot: str, grad: Tensor) -> None:
        """Add to the gradient of a slot; the first one is kept as it is."""
        known = self.grads.get(slot)
        self.grads[slot] = grad if known is None else known + grad


class _Gate(torch.autograd.Function):
    """Lets a value into a phase, and its gradient out of it."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, value: Tensor, slot: str, grads: dict[str, Tensor]) -> Tensor:
        ctx.slot, ctx.grads = slot, grads
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        ctx.grads[ctx.slot] = grad
        return None, None, None, None


def let_in(values: dict[str, Tensor], taped: Taped) -> dict[str, Tensor]:
    """The inputs of a phase, cut off from what made them; gradients of floating ones end in `taped`."""
    ticket = torch.zeros((), requires_grad=True)  # makes autograd record a gate whose value needs no grad

    def one(slot: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        entered: Tensor = _Gate.apply(ticket, value, slot, taped.grads)  # type: ignore[no-untyped-call]
        return carry_over(value, entered)

    return {slot: one(slot, value) for slot, value in values.items()}
