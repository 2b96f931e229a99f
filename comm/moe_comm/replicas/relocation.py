"""From one placement of copies to the next with few moves: weights that stay need not travel.

A new placement is free in many ways that do not change the balance: which of the alike nodes and ranks
gets which set of experts. And most of the balance is often had by changing the old placement a little.
So several placements are made, all as balanced as asked, and the one with the fewest moves is taken, for
each layer apart:

    renamed   the fresh placement, its nodes and ranks renamed after those of the old one most like them
    patched   the old one with some slots given to other experts (none; those whose share is too large;
              all that counting afresh would change), then exchanges between ranks above the goal only

Each is then gone through once more for exchanges that bring copies home without breaking the goal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.replicas.packing import (
    count_copies,
    even_out,
    pairing,
    rank_loads,
    shares_of,
    swap_pairs,
)

_ROUNDING = 1.0 + 1e-9


@dataclass(frozen=True)
class Move:
    """What is known when a placement replaces another; shapes with N nodes of G ranks of S slots.

    Args:
        loads: float64 [layers, experts].
        previous: int64 [layers, N, G, S], experts distinct within a rank.
        members: bool [layers, N, experts]: the node that each expert shall be on if `previous` is patched.
        patchable: bool [layers]: `previous` keeps every expert on one node, as `members` wants.
        goal: float64 [layers] largest load of a rank that will do.
    """

    loads: Tensor
    previous: Tensor
    members: Tensor
    patchable: Tensor
    goal: Tensor

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.loads.shape[1]


def relocate(fresh: Tensor, move: Move) -> Tensor:
    """A placement within the goal, with few moves.

    Args:
        fresh: int64 [layers, N, G, S], within the goal.
        move: the rest.

    Returns:
        int64 [layers, N, G, S]; slots whose expert stays on the rank keep it.
    """
    renamed = _rename(fresh, move)
    found = [_go_home(renamed, move)]
    largest = shares_of(move.loads, _layer_counts(fresh, move)).amax(1)
    for limit in (torch.full_like(largest, torch.inf), largest, torch.zeros_like(largest)):
        patched, whole = _patch(move, limit)
        usable = whole & (_heaviest(patched, move) <= move.goal * _ROUNDING)
        patched = torch.where(usable[:, None, None, None], patched, renamed)
        found.append(_go_home(patched, move))
    moved = torch.stack([count_moved(each, move.previous, move.num_experts) for each in found])
    best = moved.argmin(0)
    return keep_slots(torch.stack(found)[best, torch.arange(len(best))], move.previous)


def count_moved(experts: Tensor, previous: Tensor, num_experts: int) -> Tensor:
    """Copies on a rank that did not hold the expert: int64 [layers], from two [layers, N, G, S]."""
    stay = _presence(experts.flatten(1, 2), num_experts) * _presence(previous.flatten(1, 2), num_experts)
    return experts[0].numel() - stay.sum((1, 2)).long()


def keep_slots(experts: Tensor, previous: Tensor) -> Tensor:
    """Order the slots of each rank so that an expert that stays keeps its slot; both [..., slots]."""
    same = experts.unsqueeze(-1) == previous.unsqueeze(-2)  # [..., slots now, slots before]
    stays, kept = same.any(-1), same.any(-2)
    newcomers = torch.argsort(stays.long(), dim=-1, stable=True)
    open_slots = torch.argsort(kept.long(), dim=-1, stable=True)
    placed = torch.empty_like(experts).scatter_(-1, open_slots, experts.gather(-1, newcomers))
    return torch.where(kept, previous, placed)


def _presence(experts: Tensor, num_experts: int) -> Tensor:
    """1.0 where a bin holds an expert: float32 [batch, bins, experts], from int64 [batch, bins, slots]."""
    table = torch.zeros((*experts.shape[:2], num_experts))
    return table.scatter_(2, experts, 1.0)


def _layer_counts(experts: Tensor, move: Move) -> Tensor:
    return count_copies(experts.flatten(1, 2), move.num_experts)


def _heaviest(experts: Tensor, move: Move) -> Tensor:
    shares = shares_of(move.loads, _layer_counts(experts, move))
    return rank_loads(experts.flatten(1, 2), shares).amax(1)


def _rename(fresh: Tensor, move: Move) -> Tensor:
    """Nodes, then the ranks of each node, in the order that leaves most copies where they were."""
    layers, nodes, ranks, slots = fresh.shape
    order = _match(fresh.flatten(2), move.previous.flatten(2), move.num_experts)
    by_node = fresh[torch.arange(layers)[:, None], order].view(layers * nodes, ranks, slots)
    order = _match(by_node, move.previous.reshape(layers * nodes, ranks, slots), move.num_experts)
    return by_node[torch.arange(layers * nodes)[:, None], order].view(fresh.shape)


def _match(experts: Tensor, previous: Tensor, num_experts: int) -> Tensor:
    """Which bin of `experts` to put in each place of `previous`: int64 [batch, bins].

    Each place takes the most like of the bins left, then two places exchange while any exchange adds.
    """
    overlap = _presence(previous, num_experts) @ _presence(experts, num_experts).transpose(1, 2)
    batch, bins = overlap.shape[:2]
    rows = torch.arange(batch)
    order = torch.empty((batch, bins), dtype=torch.int64)
    taken = torch.zeros((batch, bins), dtype=torch.bool)
    for place in range(bins):
        order[:, place] = overlap[:, place].masked_fill(taken, -1.0).argmax(1)
        taken[rows, order[:, place]] = True
    flat = overlap.flatten(1)
    for sweep in range(4 * bins):
        first, second = pairing(bins, sweep % bins)
        ours, theirs = order[:, first], order[:, second]
        exchanged = flat.gather(1, first * bins + theirs) + flat.gather(1, second * bins + ours)
        gain = exchanged - flat.gather(1, first * bins + ours) - flat.gather(1, second * bins + theirs)
        order[:, first] = torch.where(gain > 0, theirs, ours)
        order[:, second] = torch.where(gain > 0, ours, theirs)
    return order


def _patch(move: Move, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The previous placement, changed as little as shares up to `limit` and the goal allow.

    Returns:
        experts [layers, N, G, S], and bool [layers]: every expert has a copy, and on its node.
    """
    layers, nodes, ranks, slots = move.previous.shape
    previous = move.previous.reshape(layers * nodes, ranks, slots)
    members = move.members.flatten(0, 1)
    loads = move.loads.repeat_interleave(nodes, 0).masked_fill(~members, 0.0)
    before = count_copies(previous, move.num_experts)
    counts = _adapt(loads, before, members, limit.repeat_interleave(nodes), ranks, ranks * slots)
    shares = shares_of(loads, counts)
    experts = previous.clone()
    for index in torch.nonzero((counts != before).any(1)).flatten().tolist():
        held = experts[index].tolist()
        _hand_over(held, before[index].tolist(), counts[index].tolist(), shares[index].tolist())
        experts[index] = torch.tensor(held)
    counts = count_copies(experts, move.num_experts)
    whole = ((counts > 0) == members).all(1).view(layers, nodes).all(1) & move.patchable
    experts = even_out(experts, shares_of(loads, counts), move.goal.repeat_interleave(nodes))
    return experts.view(move.previous.shape), whole


def _adapt(
    loads: Tensor, before: Tensor, members: Tensor, limit: Tensor, num_ranks: int, num_slots: int
) -> Tensor:
    """Counts near those before: right in sum, then slots go to shares above `limit` while that helps."""
    counts = torch.where(members, before.clamp(1, num_ranks), 0)
    rows = torch.arange(loads.shape[0])
    for _ in range(2 * num_slots):
        free = num_slots - counts.sum(1)
        wanting = shares_of(loads, counts).masked_fill(~members | (counts >= num_ranks), -1.0)
        losing = torch.where(counts > 1, loads / (counts - 1).clamp(min=1), torch.inf)
        want, taker = wanting.max(1)
        lose, giver = losing.min(1)
        worth = (want > limit * _ROUNDING) & (lose * _ROUNDING < want)
        give = (free < 0) | ((free == 0) & worth)
        take = (free > 0) | ((free == 0) & worth)
        if not bool((give | take).any()):
            break
        counts[rows, giver] -= give.long()
        counts[rows, taker] += take.long()
    return counts


def _hand_over(held: list[list[int]], before: list[int], counts: list[int], shares: list[float]) -> None:
    """Give slots of experts with too many copies to those with too few, on the lightest rank that may.

    A copy that no rank may take is left out; the caller looks for what is missing.
    """
    surplus = [old - new for old, new in zip(before, counts, strict=True)]
    loads = [sum(shares[expert] for expert in experts) for experts in held]
    lacking = [expert for expert, extra in enumerate(surplus) for _ in range(-extra)]
    for expert in sorted(lacking, key=lambda expert: -shares[expert]):
        places = [
            (loads[rank] - shares[old], rank, slot)
            for rank, experts in enumerate(held)
            if expert not in experts
            for slot, old in enumerate(experts)
            if surplus[old] > 0
        ]
        if places:
            rest, rank, slot = min(places)
            surplus[held[rank][slot]] -= 1
            held[rank][slot] = expert
            loads[rank] = rest + shares[expert]


def _go_home(experts: Tensor, move: Move) -> Tensor:
    """Exchange copies within nodes where that brings them back to their ranks and keeps to the goal."""
    layers, nodes, ranks, slots = experts.shape
    shares = shares_of(move.loads, _layer_counts(experts, move)).repeat_interleave(nodes, 0)
    goal = (move.goal * _ROUNDING).repeat_interleave(nodes)[:, None, None, None]
    home = _presence(move.previous.reshape(layers * nodes, ranks, slots), move.num_experts).flatten(1)

    def at_home(where: Tensor, held: Tensor) -> Tensor:
        return _of(home, where.unsqueeze(2) * move.num_experts + held)

    placed = experts.reshape(layers * nodes, ranks, slots).clone()
    for total in range(ranks if ranks > 1 else 0):
        first, second = (ends.expand(layers * nodes, -1) for ends in pairing(ranks, total))
        loads = rank_loads(placed, shares)

        def strangers(
            ours: Tensor,
            theirs: Tensor,
            first: Tensor = first,
            second: Tensor = second,
            loads: Tensor = loads,
        ) -> Tensor:
            given = _of(shares, ours).unsqueeze(3) - _of(shares, theirs).unsqueeze(2)
            too_heavy = (loads.gather(1, first)[..., None, None] - given > goal) | (
                loads.gather(1, second)[..., None, None] + given > goal
            )
            leave = (at_home(first, ours) - at_home(second, ours)).unsqueeze(3)
            leave = leave + (at_home(second, theirs) - at_home(first, theirs)).unsqueeze(2)
            return leave.masked_fill_(too_heavy | (leave >= 0), torch.inf)

        swap_pairs(placed, first, second, strangers)
    return placed.view(experts.shape)


def _of(table: Tensor, experts: Tensor) -> Tensor:
    return table.gather(1, experts.flatten(1)).view(experts.shape)
