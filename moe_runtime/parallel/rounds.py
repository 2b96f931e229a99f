"""A MoE block whose rows do not fit: its dispatch, experts and combine in rounds, in one step each way.

A dispatcher with `max_rows` refuses an exchange that would overfill a rank. All ranks of the
expert-parallel group learn it alike where they first wait for rows: in the block's `experts` step. The
rounds (`moe_comm.rounds`) then run inside that step, and the neighbouring steps have nothing to do:

    step         in one piece                     in rounds
    dispatch     starts the exchange              starts it; it is refused
    experts      waits, computes                  per round: dispatch, experts, combine
    combine      starts the way back              -
    combine_b    starts the gradient on its way   keeps the gradient
    experts_b    waits, computes                  per round: dispatch, experts again, their backward, back
    dispatch_b   starts the way back              -

Ranks of a group run the same steps in the same order, those of an overlapped pair too, so all
collectives of the rounds stand at one place of that order on every rank: behind whatever the other half
of the pair has started, which flies on or has arrived. What is lost is the overlap of this one block.

Weight gradients of the experts run at once, also where the schedule defers them: deferred, they would
hold the rows and activations of all rounds until then, the memory that rounds are there to save.
"""

import time
from typing import Any

from moe_comm.dispatcher import Dispatcher, Pending
from moe_comm.errors import ReceiveOverflow
from moe_comm.rounds import Experts, LayerInRounds, plan_after
from moe_comm.wire.carried import carry_over
from torch import Tensor


class BlockInRounds:
    """One microbatch in the routed part of one block.

    Args:
        dispatcher: which refused the exchange.
        overflow: what it raised.
        tokens: [sequences, seq_len, hidden] or [tokens, hidden], what the experts read.
        weights: [tokens, top_k] gate weights.
        expert_ids: int64 [tokens, top_k].
        experts: as the block's phase computes them.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        overflow: ReceiveOverflow,
        tokens: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        experts: Experts,
    ) -> None:
        self.wait_s = 0.0
        self._shape = tokens.shape
        self._d_output: Tensor | None = None
        self._layer = LayerInRounds(
            dispatcher,
            plan_after(overflow, dispatcher, expert_ids),
            carry_over(tokens, tokens.reshape(-1, tokens.shape[-1])),
            weights,
            expert_ids,
            experts,
            self._wait,
        )

    def forward(self) -> Tensor:
        """The routed output, shaped as the tokens."""
        return self._layer.forward().reshape(self._shape)

    def keep_gradient(self, d_output: Tensor) -> None:
        """Take the gradient of the routed output, shaped as the tokens, for `backward`."""
        self._d_output = d_output

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens, shaped as they are, and of the weights [tokens, top_k]."""
        d_output, self._d_output = self._d_output, None
        assert d_output is not None, "a backward in rounds before the gradient of its output"
        found = self._layer.backward(d_output.reshape(-1, d_output.shape[-1]))
        return found.tokens.reshape(self._shape), found.weights

    def take_wait_s(self) -> float:
        """Seconds spent waiting for exchanges since the last call."""
        seconds, self.wait_s = self.wait_s, 0.0
        return seconds

    def _wait(self, pending: Pending[Any]) -> Any:
        begun = time.perf_counter()
        value = pending.wait()
        self.wait_s += time.perf_counter() - begun
        return value
