"""Which slot travels in which round, so that no rank ever handles more rows at once than it was built for.

Every rank knows from the counts (`ReceiveOverflow.rows_sent`) how many rows each source has for each
destination, and so every rank makes the same table without a further message: rows[source, destination]
of each round. A round may load each rank with `max_rows` rows in each of three offices, since each has
its own buffers:

    source        the rows that it sends
    destination   the rows that it receives
    forwarder     with two hops, the rows that pass through it: from the sources of its local index to
                  the destinations of its node

The table is filled greedily along the diagonals (source, source + shift): on one of them no two pairs
share a source, a destination or a forwarder, so it is one vector operation that takes all that the three
allow. After a round each pair with rows left has an office full, so the number of rounds is below the
sum of what source, forwarder and destination would each need alone; it is just that of the destination
where, as with an adversarial router, one rank is the bottleneck.

Within a (source, destination) block slots go in the order of tokens, not of experts: the copies of one
token then share a round nearly always, which keeps its partial sums together and, with two hops, lets it
still cross to a node once.

Rejected: a quota for each (source, destination) pair alone, max_rows / ep_size (no table, but ep_size
times the rounds where only one source is large); the arrival order at the destination cut into pieces
of max_rows (bounds the receiver, but a source with rows for everybody sends ep_size times as much).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.errors import CommError, CountMismatch
from moe_comm.placement import Placement


@dataclass(frozen=True)
class RoundPlan:
    """When this rank's slots travel.

    Args:
        slot_rounds: int64 [tokens, top_k] round of each slot, -1 for a slot without a choice.
        num_rounds: the same on every rank, at least 1.
    """

    slot_rounds: Tensor
    num_rounds: int

    def choose(self, index: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What one round sends.

        Args:
            index: of the round.
            expert_ids: int64 [tokens, top_k].

        Returns:
            Tokens with a slot in the round, int64 [chosen]; and their expert ids [chosen, top_k], with -1
            in the slots of other rounds.
        """
        here = self.slot_rounds == index
        chosen = here.any(dim=1).nonzero().flatten()
        ids = expert_ids.index_select(0, chosen)
        return chosen, ids.masked_fill_(~here.index_select(0, chosen), -1)


def share_out(rows_sent: Tensor, max_rows: int, lanes: int = 1) -> Iterator[Tensor]:
    """Cut the rows of an exchange into rounds.

    Args:
        rows_sent: int64 [ep_size, ep_size] on the CPU, rows of source s for destination d.
        max_rows: most rows of one rank in a round, in each of its offices.
        lanes: ranks per node where rows are forwarded within nodes; 1 where they go straight.

    Yields:
        int64 [ep_size, ep_size] rows of each round; their sum is rows_sent.

    Raises:
        CommError: max_rows is below 1, or lanes do not divide ep_size.
    """
    ep_size = rows_sent.shape[0]
    if max_rows < 1:
        raise CommError(f"rounds: expected max_rows of at least 1, got {max_rows}")
    if lanes < 1 or ep_size % lanes:
        raise CommError(f"rounds: {lanes} ranks per node do not divide {ep_size} expert-parallel ranks")
    left = rows_sent.clone()
    while bool(left.any()):
        taken = _fill_round(left, max_rows, lanes)
        left -= taken
        yield taken


def _fill_round(left: Tensor, max_rows: int, lanes: int) -> Tensor:
    """As many of the rows left as one round can hold: int64 [ep_size, ep_size]."""
    ep_size = left.shape[0]
    source = torch.arange(ep_size, device=left.device)
    sends, receives, forwards = (torch.full_like(source, max_rows) for _ in range(3))
    taken = torch.zeros_like(left)
    for shift in range(ep_size):
        destination = (source + shift) % ep_size
        wanted = left[source, destination]
        if not bool(wanted.any()):
            continue
        forwarder = destination - destination % lanes + source % lanes
        room = torch.minimum(sends, torch.minimum(receives[destination], forwards[forwarder]))
        rows = torch.minimum(wanted, room)
        taken[source, destination] = rows
        sends -= rows
        receives[destination] -= rows
        forwards[forwarder] -= rows
    return taken


def plan_rounds(
    expert_ids: Tensor, rows_sent: Tensor, placement: Placement, max_rows: int, lanes: int = 1
) -> RoundPlan:
    """Give every slot of this rank its round.

    Args:
        expert_ids: int64 [tokens, top_k], -1 where there is no choice.
        rows_sent: int64 [ep_size, ep_size] on the CPU, rows of source s for destination d; the same on
            every rank.
        placement: where experts live.
        max_rows: most rows that a rank sends, receives or forwards in a round.
        lanes: ranks per node where rows are forwarded within nodes; 1 where they go straight.

    Returns:
        The plan, on the device of expert_ids.

    Raises:
        CommError: max_rows is below 1, or lanes do not divide ep_size.
        CountMismatch: rows_sent is not of these expert_ids.
    """
    flat = expert_ids.reshape(-1)
    destination = torch.div(flat, placement.local_experts, rounding_mode="floor")  # -1 stays -1
    counts = torch.bincount(destination + 1, minlength=placement.ep_size + 1)
    own = rows_sent[placement.ep_rank]
    if counts[1:].tolist() != own.tolist():
        raise CountMismatch(f"rounds: expected rows {counts[1:].tolist()} as routed, got {own.tolist()}")
    table = [taken[placement.ep_rank] for taken in share_out(rows_sent, max_rows, lanes)]
    slot_rounds = torch.full_like(flat, -1)
    if table:
        by_destination = torch.stack(table, dim=1).reshape(-1)  # [ep_size x rounds]
        rounds = (
            torch.arange(len(table), device=by_destination.device)
            .repeat(placement.ep_size)
            .repeat_interleave(by_destination)
        )
        order = torch.argsort(destination, stable=True)[int(counts[0]) :]
        slot_rounds[order] = rounds.to(flat.device)
    return RoundPlan(slot_rounds.view(expert_ids.shape), max(len(table), 1))
