"""What ranks tell each other before rows travel: that they agree, and how much will come.

Every rank sends every rank one short row of int64: a header and, before a dispatch, the counts that the
other one needs. Headers let all ranks see a disagreement at the same moment and raise alike; a rank
whose own input is wrong says so in its header instead of leaving the others waiting for its rows for
ever. All operations send messages of one size, so that a rank which calls another operation than its
peers is told so too, in place of a transport's complaint about lengths.

A dispatch needs this message. The other operations know their counts from the handle: they send it
over host memory, where it costs one latency on a thread of its own, unless a caller whose order of
operations is fixed asks to save that; and leave it out for CUDA tensors, where it would make the host
wait for the device. Where it is left out, a rank that refuses is not heard: its peers wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor

from moe_comm.errors import CommError, InputError, PlacementError, RankDisagreement, ReceiveOverflow
from moe_comm.placement import Placement
from moe_comm.traffic import TrafficMeter
from moe_comm.transport import Transport
from moe_comm.wire.codec import WIRES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
_FINE, _REFUSED = 0, 1
_HOST = torch.device("cpu")
# Verdict, number of the operation, operation, hidden, dtype of rows, dtype of weights, top_k, whose handle.
HEADER_SIZE = 8
OPENING = (
    "kind",
    "number of experts",
    "wire",
    "max_rows",
    "ranks_per_node",
    "first_rank",
    "num_groups",
    "chunks",
    "confirm",
)


@dataclass(frozen=True)
class Statement:
    """What a rank says before an operation; equal on all ranks, the refusal apart.

    Args:
        operation: one of OPERATIONS.
        number: how many operations this rank has begun before.
        hidden: width of a row.
        dtype: of the rows.
        weight_dtype: of the gate weights; that of the rows where there are none.
        top_k: choices of a token; 0 where no choices travel.
        of_dispatch: number of the dispatch that gave the handle; its own number if it is one.
        device: of the rows; not told.
        refusal: why this rank cannot take part.
    """

    operation: str
    number: int
    hidden: int = 0
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    top_k: int = 0
    of_dispatch: int = 0
    device: torch.device = _HOST
    refusal: CommError | None = None

    def header(self) -> list[int]:
        """HEADER_SIZE integers."""
        if self.refusal is not None:
            return [_REFUSED, self.number, OPERATIONS.index(self.operation), 0, 0, 0, 0, 0]
        kinds = (DTYPES.index(self.dtype), DTYPES.index(self.weight_dtype))
        rest = (self.hidden, *kinds, self.top_k, self.of_dispatch)
        return [_FINE, self.number, OPERATIONS.index(self.operation), *rest]


class Control:
    """The exchange that precedes rows.

    Args:
        transport: over the whole group.
        traffic: counts the messages.
        width: int64 counts that a message carries to each rank.
        confirms: agree before combines and backwards too.
    """

    def __init__(
        self, transport: Transport, traffic: TrafficMeter, width: int, confirms: bool = True
    ) -> None:
        self._transport = transport
        self._traffic = traffic
        self._width = width
        self._confirms = confirms
        self._ones = (1,) * transport.size
        self._begun = 0

    def state(
        self,
        operation: str,
        rows: Tensor,
        weights: Tensor | None,
        check: Callable[[], None],
        handle: Any = None,
    ) -> Statement:
        """What this rank says of an operation that it is about to begin.

        Args:
            rows: [n, hidden].
            weights: gate weights or their gradients, if they travel.
            check: raises a CommError where the input cannot be exchanged; may read the handle.
            handle: of the dispatch that it belongs to, with its `number` and its `origin`, this object; not
                read before a dispatch.
        """
        number, self._begun = self._begun, self._begun + 1
        device = rows.device if isinstance(rows, Tensor) else self._transport.device
        try:
            if operation != "dispatch":
                require_own_handle(operation, handle, self)
            check()
        except CommError as error:
            return Statement(operation, number, device=device, refusal=error)
        weight_dtype = rows.dtype if weights is None else weights.dtype
        if operation != "dispatch":
            top_k, of_dispatch = 0, handle.number
        else:
            top_k, of_dispatch = 0 if weights is None else weights.shape[1], number
        hidden, dtype = rows.shape[1], rows.dtype
        return Statement(operation, number, hidden, dtype, weight_dtype, top_k, of_dispatch, device)

    def confirm(self, statement: Statement) -> None:
        """Agree on an operation whose counts are known; left out on CUDA, and on request."""
        if self._confirms and statement.device.type == "cpu":
            self.agree(statement)

    def refuse(self, statement: Statement) -> Never:
        """Tell the others, where they listen before this operation, and raise the refusal."""
        assert statement.refusal is not None
        if statement.operation == "dispatch" or (self._confirms and statement.device.type == "cpu"):
            self.agree(statement)
        raise statement.refusal

    def agree(self, statement: Statement, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tell all ranks, hear them all, and raise on all alike where they do not agree.

        Args:
            statement: of this rank.
            counts: int64 [ep_size, width], row d for rank d; None: zeros.

        Returns:
            What was said and what was heard, int64 [ep_size, width] on the CPU; row s from rank s.

        Raises:
            CommError: the refusal of this rank.
            RankDisagreement: another rank refused, or the statements differ.
            TransportError: the backend failed.
        """
        device = self._transport.device
        size = self._transport.size
        heads = torch.tensor(statement.header(), device=device).expand(size, HEADER_SIZE)
        if counts is None or statement.refusal is not None:
            counts = torch.zeros((size, self._width), dtype=torch.int64, device=device)
        message = torch.cat((heads, counts.to(device)), dim=1)
        self._traffic.count_control(message.shape[1] * message.element_size())
        heard = self._transport.all_to_all(message, self._ones, self._ones).wait()
        if statement.refusal is not None:
            raise statement.refusal
        message, heard = torch.stack((message, heard)).cpu()
        _require_agreement(heard[:, :HEADER_SIZE], self._transport.rank)
        return message[:, HEADER_SIZE:], heard[:, HEADER_SIZE:]


def layout_facts(placement: Placement) -> dict[str, int]:
    """What of a placement must be equal on all ranks, as `agree_on_opening` takes it."""
    return {
        "number of experts": placement.num_experts,
        "ranks_per_node": placement.ranks_per_node or placement.ep_size,
        "first_rank": placement.first_rank,
        "num_groups": placement.num_groups or 0,
    }


def require_own_handle(operation: str, handle: Any, origin: object) -> None:
    """Refuse a handle that another dispatcher gave, or that is none.

    Raises:
        InputError: says what was got.
    """
    given = getattr(handle, "origin", None)
    if given is not origin:
        got = type(handle).__name__ if given is None else "that of another one"
        raise InputError(f"{operation}: expected a handle of this dispatcher, got {got}")


def check_bound(rows_sent: Tensor, max_rows: int | None, lanes: int = 1) -> None:
    """Raise if any rank would send, pass on or receive too much.

    Args:
        rows_sent: int64 [ep_size, ep_size] rows that rank s sends to rank d; the same on all ranks.
        max_rows: of a rank; None: any number.
        lanes: ranks per node where rows are passed on within nodes; 1 where they go straight.

    Raises:
        ReceiveOverflow: names the fullest rank.
    """
    if max_rows is None:
        return
    nodes = rows_sent.shape[0] // lanes
    # A row of source (node, lane) for a rank of a node goes through the rank of that lane there.
    by_place = rows_sent.view(nodes, lanes, nodes, lanes)
    offices = {
        "to receive": rows_sent.sum(0),
        "to send": rows_sent.sum(1),
        "to pass on": by_place.sum((0, 3)).t().reshape(-1),
    }
    for what, rows in offices.items():
        fullest = int(rows.argmax())
        if int(rows[fullest]) > max_rows:
            raise ReceiveOverflow(
                f"dispatch: expected at most max_rows {max_rows} rows on a rank, got {int(rows[fullest])} "
                f"{what} for expert-parallel rank {fullest}; raise max_rows, send less, or go in rounds",
                rows_sent.clone(),
            )


def agree_on_opening(transport: Transport, facts: Mapping[str, int]) -> None:
    """Raise on all ranks alike unless all opened the same dispatcher.

    Args:
        transport: over the whole group.
        facts: what must be equal, by names of OPENING; what is left out counts as 0.

    Raises:
        PlacementError: names the ranks and what differs.
    """
    ones = (1,) * transport.size
    # One length for all kinds: a rank that opens another kind is told so, by whatever it opened.
    row = torch.tensor([facts.get(n, 0) for n in OPENING], dtype=torch.int64, device=transport.device)
    heard = transport.all_to_all(row.expand(transport.size, -1).contiguous(), ones, ones).wait().cpu()
    for name, column in zip(OPENING, heard.t(), strict=True):
        other = torch.nonzero(column != column[0]).flatten()
        if other.numel():
            raise PlacementError(
                f"open_dispatcher: expected the same {name} on all ranks, got {_spell(name, column[0])} on "
                f"expert-parallel rank 0 and {_spell(name, column[other[0]])} on rank {int(other[0])}"
            )


def _spell(name: str, value: Tensor) -> str:
    """What the user said, from the number that stands for it."""
    number = int(value)
    words = {"kind": ("", "alltoall", "two_hop"), "wire": WIRES}.get(name)
    if words is not None:
        return words[number]
    return "none" if (name, number) in (("max_rows", -1), ("num_groups", 0)) else str(number)


def _require_agreement(heads: Tensor, rank: int) -> None:
    if bool((heads == heads[0]).all()) and int(heads[0, 0]) == _FINE:
        return
    operation = OPERATIONS[int(heads[rank, 2])]
    refusing = torch.nonzero(heads[:, 0] == _REFUSED).flatten().tolist()
    if refusing:
        raise RankDisagreement(
            f"{operation}: expert-parallel ranks {refusing} refused their own input; see there"
        )
    other = int(torch.nonzero((heads != heads[0]).any(dim=1))[0])
    first, second = _describe(heads[0].tolist(), heads[other].tolist())
    raise RankDisagreement(
        f"{operation}: expected the same of all ranks, got {first} on expert-parallel rank 0 "
        f"and {second} on rank {other}"
    )


def _describe(first: Sequence[int], second: Sequence[int]) -> tuple[str, str]:
    """What two headers say, as far as it tells them apart."""
    if first[1:3] != second[1:3]:
        one, two = (f"{OPERATIONS[head[2]]} as operation {head[1]}" for head in (first, second))
        return one, two
    if first[7] != second[7]:
        one, two = (f"the handle of operation {head[7]}" for head in (first, second))
        return one, two
    one, two = (
        f"hidden {head[3]} of {DTYPES[head[4]]} with weights of {DTYPES[head[5]]}"
        + (f" for {head[6]} choices" if head[6] else "")
        for head in (first, second)
    )
    return one, two
