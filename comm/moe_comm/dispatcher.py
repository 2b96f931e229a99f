"""What a dispatcher is: tokens go to the ranks of their experts, and come back summed.

`dispatch` moves one row per (token, chosen expert) to the rank that holds the expert and returns a
handle; `combine` undoes it. Everything is started at once and waited for later, so that the caller
computes meanwhile. None of it is autograd: each operation knows its own backward, which is the other
one with the same handle. `moe_comm.autograd` joins them to autograd for callers that want that.

    forward    rows = dispatch(tokens)          tokens = combine(rows)       (sum over the k copies)
    backward   d_tokens = combine(d_rows)       d_rows = dispatch(d_tokens)  (no new layout)

Gate weights travel with the rows and are applied at the expert, before any sum, so combine adds
without weights; the gradient of a row's weight returns with that of the row.

All ranks of the group must call the same operations in the same order.
"""

from dataclasses import dataclass
from typing import Any, Never, Protocol, Self, TypeVar

from torch import Tensor

from moe_comm.errors import CommError
from moe_comm.placement import Placement
from moe_comm.traffic import TrafficMeter

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """An operation that has been started."""

    def wait(self) -> T_co:
        """Block until it is done; call once."""
        ...


@dataclass(frozen=True)
class Received:
    """Rows as the experts of this rank receive them.

    Args:
        rows: [num_rows, hidden], ordered by local expert, then source rank, then source token.
        row_weights: [num_rows] gate weight of each row.
        row_counts: int64 [local_experts] on the CPU; sums to num_rows.
        handle: what `combine` and the backward operations need; opaque and immutable.
    """

    rows: Tensor
    row_weights: Tensor
    row_counts: Tensor
    handle: Any


class SharedByCopies:
    """A deep copy of a layer talks through the same dispatcher: a connection cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Never:
        raise CommError("a dispatcher is a connection and cannot be pickled; save the layer's state_dict()")


class Dispatcher(Protocol):
    """Moves tokens between the ranks of one expert-parallel group.

    Inputs are read until the wait: changing one in place before is an `InputError` there.

    Attributes:
        placement: where experts live.
        traffic: counts the rows and bytes that were sent.
        max_rows: rows that a rank may send, pass on or receive in one dispatch; None: any number.
    """

    placement: Placement
    traffic: TrafficMeter
    max_rows: int | None

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Pending[Received]:
        """Start sending each token to its experts.

        Args:
            tokens: [tokens, hidden], any floating dtype.
            weights: [tokens, top_k] gate weights.
            expert_ids: int64 [tokens, top_k], global expert numbers, distinct within a token; -1 is no
                choice: such a slot is left out, the gradient of its weight is zero.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Pending[Tensor]:
        """Start returning expert outputs [num_rows, hidden]; gives [tokens, hidden], summed per token."""
        ...

    def combine_backward(self, d_tokens: Tensor, handle: Any) -> Pending[Tensor]:
        """Backward of combine: [tokens, hidden] gradients become [num_rows, hidden]."""
        ...

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: Any
    ) -> Pending[tuple[Tensor, Tensor]]:
        """Backward of dispatch: gives ([tokens, hidden], [tokens, top_k])."""
        ...

    def give_up(self, cause: BaseException) -> None:
        """This rank cannot go on: peers get a `TransportError` as soon as may be, and so do later calls."""
        ...
