"""How many copies each expert gets, and which rank holds which copy: many instances at once.

An instance is a set of experts with measured loads, a number of slots and a number of ranks with equally
many slots each. A copy carries its expert's load divided by the number of its copies (its *share*).
Wanted: the heaviest rank as light as possible, and no rank with two copies of one expert, which would
waste a slot. Three steps, each for all instances in one set of tensor operations:

    count    every expert once; each spare slot to the expert with the largest share
    deal     copies from the heaviest to the lightest, one to each rank a round, the next to the lightest rank
    even out pairs of ranks, a heavy and a light one, exchange two copies so as to meet half way

Dealing in rounds keeps the numbers of free slots equal, so that a rank which may take the next copy always
exists: the copies of one expert are neighbours in the order and touch two rounds at most; in the second
they go first, to ranks that have none. Filling the lightest rank with a free slot, one copy at a time,
is a better start but runs into dead ends, and is as sequential as there are slots. The exchanges make up
for it: each works on half as many disjoint pairs as there are ranks, and no exchange lifts the heavier of
its two ranks, so the heaviest of all never gets heavier.

Counting alone is optimal for the heaviest share, not for the heaviest rank; where a gap is left (few
slots a rank), `pack` tries moving a slot from one expert to another.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_NEAR = 1.0 + 1e-9  # gains below this ratio are rounding
_CLOSE = 1.0003  # heaviest rank over the mean: below, no more copies are exchanged
_SETTLED = 1.002  # heaviest rank over its bound: below, no slots are moved between experts
_CHOICE = 4  # experts considered for giving a slot, and for taking it
_SMALL = 12  # experts of an instance in which all are considered


def shares_of(loads: Tensor, counts: Tensor) -> Tensor:
    """Load of one copy of each expert, [instances, experts]; 0 where an expert is not in the instance."""
    return torch.where(counts > 0, loads / counts.clamp(min=1), 0.0)


def rank_loads(experts: Tensor, shares: Tensor) -> Tensor:
    """Load of each rank.

    Args:
        experts: int64 [instances, ranks, slots] expert in each slot.
        shares: float64 [instances, experts].

    Returns:
        float64 [instances, ranks].
    """
    return shares.gather(1, experts.flatten(1)).view(experts.shape).sum(2)


def count_copies(experts: Tensor, num_experts: int) -> Tensor:
    """Copies of each expert: int64 [instances, experts], from experts [instances, ranks, slots]."""
    flat = experts.flatten(1)
    return flat.new_zeros((flat.shape[0], num_experts)).scatter_add_(1, flat, torch.ones_like(flat))


def add_copies(loads: Tensor, counts: Tensor, spare: int, num_ranks: int) -> Tensor:
    """Give spare slots away, one by one, to the largest share; no expert gets more copies than ranks.

    This makes the largest share as small as it can be. The result is independent of units of load.

    Args:
        loads: float64 [instances, experts].
        counts: int64 [instances, experts] to begin with; 0 where an expert is not in the instance.
        spare: slots to give, at most what fits.
        num_ranks: ranks of an instance.

    Returns:
        int64 [instances, experts].
    """
    counts = counts.clone()
    rows = torch.arange(loads.shape[0])
    shares = shares_of(loads, counts).masked_fill_((counts == 0) | (counts >= num_ranks), -1.0)
    for _ in range(spare):
        chosen = shares.argmax(1)
        counts[rows, chosen] += 1
        copies = counts[rows, chosen]
        shares[rows, chosen] = (loads[rows, chosen] / copies).masked_fill_(copies >= num_ranks, -1.0)
    return counts


def deal(shares: Tensor, counts: Tensor, num_ranks: int) -> Tensor:
    """Hand the copies out, heaviest first, one to each rank a round.

    Args:
        shares: float64 [instances, experts].
        counts: int64 [instances, experts], at most num_ranks each, of equal sum, a multiple of num_ranks.
        num_ranks: ranks of an instance.

    Returns:
        int64 [instances, ranks, slots]; the experts of a rank are distinct.
    """
    batch, num_slots = shares.shape[0], int(counts[0].sum())
    order = torch.argsort(shares, dim=1, descending=True, stable=True)
    ends = counts.gather(1, order).cumsum(1)
    places = torch.arange(num_slots).expand(batch, num_slots).contiguous()
    copies = order.gather(1, torch.searchsorted(ends, places, right=True))
    copy_shares = shares.gather(1, copies)
    columns = torch.arange(num_ranks).expand(batch, num_ranks)
    loads = shares.new_zeros((batch, num_ranks))
    rounds: list[Tensor] = []
    for start in range(0, num_slots, num_ranks):
        dealt = copies[:, start : start + num_ranks]
        ranks = torch.argsort(loads, dim=1, stable=True)
        if rounds:
            ranks = _spread_leading(loads, rounds[-1], copies[:, start - 1 : start], dealt, columns)
        rounds.append(torch.empty_like(dealt).scatter_(1, ranks, dealt))
        loads = loads.scatter_add(1, ranks, copy_shares[:, start : start + num_ranks])
    return torch.stack(rounds, dim=2)


def _spread_leading(loads: Tensor, before: Tensor, leading: Tensor, dealt: Tensor, columns: Tensor) -> Tensor:
    """Ranks for the copies of a round, where the expert that ended the last round may go on in this one."""
    going_on = (dealt == leading).sum(1, keepdim=True)
    free_first = torch.argsort(loads.masked_fill(before == leading, torch.inf), dim=1, stable=True)
    reserved = torch.zeros_like(before, dtype=torch.bool).scatter_(1, free_first, columns < going_on)
    by_load = torch.argsort(loads, dim=1, stable=True)
    unreserved_last = torch.argsort((~reserved).gather(1, by_load).long(), dim=1, stable=True)
    return by_load.gather(1, unreserved_last)


def pairing(num_ranks: int, total: int) -> tuple[Tensor, Tensor]:
    """Disjoint pairs of positions 0..num_ranks-1 whose sum is `total` modulo num_ranks; first < second.

    With total = num_ranks - 1 it is the fold (first with last, second with last but one ...). Over all
    totals every two positions meet once.
    """
    positions = torch.arange(num_ranks)
    partners = (total - positions) % num_ranks
    first = positions[positions < partners]
    return first, partners[first]


def swap_pairs(
    experts: Tensor,
    first: Tensor,
    second: Tensor,
    cost_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Exchange one copy between the two ranks of every pair, where that is worth it; changes `experts`.

    Args:
        experts: int64 [instances, ranks, slots].
        first: int64 [instances, pairs] a rank of each pair.
        second: int64 [instances, pairs] the other.
        cost_of: given the experts of the first and of the second ranks, [instances, pairs, slots] each, the
            cost of each exchange, [instances, pairs, slots, slots]; inf where it is not wanted.

    Returns:
        bool [instances, pairs]: an exchange was made. None ever gives a rank a second copy of an expert.
    """
    rows = torch.arange(experts.shape[0])[:, None]
    ours, theirs = experts[rows, first], experts[rows, second]
    same = ours.unsqueeze(3) == theirs.unsqueeze(2)
    held = same.any(3, keepdim=True) | same.any(2, keepdim=True)
    costs = cost_of(ours, theirs).masked_fill_(held, torch.inf).flatten(2)
    best, where = costs.min(2)
    wanted = best < torch.inf
    our_slot = torch.div(where, experts.shape[2], rounding_mode="floor")
    their_slot = where % experts.shape[2]
    our_expert = ours.gather(2, our_slot.unsqueeze(2)).squeeze(2)
    their_expert = theirs.gather(2, their_slot.unsqueeze(2)).squeeze(2)
    experts[rows, first, our_slot] = torch.where(wanted, their_expert, our_expert)
    experts[rows, second, their_slot] = torch.where(wanted, our_expert, their_expert)
    return wanted


def even_out(experts: Tensor, shares: Tensor, goal: Tensor, rounds: int = 64) -> Tensor:
    """Exchange copies between heavy and light ranks until no rank is above the goal, or none helps.

    The load of the heaviest rank never rises.

    Args:
        experts: int64 [instances, ranks, slots], distinct within a rank.
        shares: float64 [instances, experts].
        goal: float64 [instances]; ranks at or below this load have no need to give.
        rounds: how often pairs are formed, at most.

    Returns:
        int64 [instances, ranks, slots].
    """
    experts = experts.clone()
    num_ranks = experts.shape[1]
    idle = 0
    for index in range(rounds if num_ranks > 1 else 0):
        loads = rank_loads(experts, shares)
        if idle >= 2 * num_ranks or not bool((loads.amax(1) > goal * _NEAR).any()):
            break
        # Every other round the fold, the best guess; between, other sums, from its neighbours on.
        first, second = pairing(num_ranks, num_ranks - 1 - (index // 2 + 1) * (index % 2))
        order = torch.argsort(loads, dim=1, descending=True, stable=True)
        heavy, light = order[:, first], order[:, second]
        gap = loads.gather(1, heavy) - loads.gather(1, light)
        half = torch.where(loads.gather(1, heavy) > goal[:, None] * _NEAR, gap / 2, 0.0)[..., None, None]

        def off_middle(ours: Tensor, theirs: Tensor, half: Tensor = half) -> Tensor:
            given = _look_up(shares, ours).unsqueeze(3) - _look_up(shares, theirs).unsqueeze(2)
            cost = (given - half).abs_()
            return cost.masked_fill_(cost * _NEAR >= half, torch.inf)

        idle = 0 if bool(swap_pairs(experts, heavy, light, off_middle).any()) else idle + 1
    return experts


def _look_up(table: Tensor, experts: Tensor) -> Tensor:
    return table.gather(1, experts.flatten(1)).view(experts.shape)


def pack(loads: Tensor, members: Tensor, needed: Tensor, size: tuple[int, int]) -> Tensor:
    """Choose copies and their ranks.

    Args:
        loads: float64 [instances, experts], not negative.
        members: bool [instances, experts], equally many true in each; the others are not placed.
        needed: float64 [instances]; a heaviest rank as light as this is not worth a long search.
        size: slots and ranks of an instance; slots are a multiple of ranks, at least as many as members,
            and not more than ranks times as many.

    Returns:
        int64 [instances, ranks, slots of a rank] expert in each slot, distinct within a rank.
    """
    num_slots, num_ranks = size
    loads = loads.masked_fill(~members, 0.0)
    # An instance without load is placed as if its experts were all alike.
    loads = loads.masked_fill(members & (loads.sum(1, keepdim=True) == 0), 1.0)
    counts = add_copies(loads, members.long(), num_slots - int(members[0].sum()), num_ranks)
    shares = shares_of(loads, counts)
    mean = loads.sum(1) / num_ranks
    experts = even_out(deal(shares, counts, num_ranks), shares, mean * _CLOSE)
    bound = torch.maximum(torch.maximum(mean, shares.amax(1)), needed)
    return _move_slots(loads, counts, experts, bound)


def _move_slots(loads: Tensor, counts: Tensor, experts: Tensor, bound: Tensor, rounds: int = 24) -> Tensor:
    """Move slots from experts that need them least to those on the heaviest rank, while that helps."""
    num_experts = loads.shape[1]
    heaviest = rank_loads(experts, shares_of(loads, counts)).amax(1)
    active = torch.nonzero(heaviest > bound * _SETTLED).flatten()
    for _ in range(rounds):
        if not active.numel():
            break
        part, trials = loads[active], _trials(loads[active], counts[active], experts[active])
        per = trials.shape[1]
        trial_counts = trials.view(-1, num_experts)
        trial_shares = shares_of(part.repeat_interleave(per, 0), trial_counts)
        dealt = deal(trial_shares, trial_counts, experts.shape[1])
        dealt = even_out(dealt, trial_shares, bound[active].repeat_interleave(per), rounds=6)
        best, which = rank_loads(dealt, trial_shares).amax(1).view(-1, per).min(1)
        better = best * _NEAR < heaviest[active]
        chosen = (torch.arange(active.numel()) * per + which)[better]
        active = active[better]
        counts[active], experts[active], heaviest[active] = trial_counts[chosen], dealt[chosen], best[better]
    return experts


def _trials(loads: Tensor, counts: Tensor, experts: Tensor) -> Tensor:
    """Counts that differ from the present ones by one slot, int64 [instances, trials, experts].

    A slot goes to one of the busiest experts of the heaviest rank from one that misses it little; in a
    small instance, to any from any.
    """
    batch, num_experts = loads.shape
    if num_experts <= _SMALL:
        everyone = torch.arange(num_experts).expand(batch, num_experts)
        moves = _pairs(everyone, everyone)
    else:
        shares = shares_of(loads, counts)
        heavy = experts[torch.arange(batch), rank_loads(experts, shares).argmax(1)]
        busiest = torch.argsort(shares.gather(1, heavy), dim=1, descending=True, stable=True)
        after_giving = torch.where(counts > 1, loads / (counts - 1).clamp(min=1), torch.inf)
        givers = torch.argsort(after_giving, dim=1, stable=True)
        moves = _pairs(heavy.gather(1, busiest[:, :_CHOICE]), givers[:, :_CHOICE])
    trials = counts[:, None, :].expand(batch, moves.shape[1], num_experts).clone()
    one = torch.ones_like(moves[..., :1])
    trials.scatter_add_(2, moves[..., :1], one).scatter_add_(2, moves[..., 1:], -one)
    present = counts[:, None, :]
    wrong = ((trials < present.clamp(max=1)) | (trials > experts.shape[1] * present.clamp(max=1))).any(2)
    return torch.where(wrong.unsqueeze(2), present, trials)


def _pairs(takers: Tensor, givers: Tensor) -> Tensor:
    """Every (taker, giver): int64 [instances, takers x givers, 2]."""
    shape = (takers.shape[0], takers.shape[1], givers.shape[1])
    both = torch.stack((takers.unsqueeze(2).expand(shape), givers.unsqueeze(1).expand(shape)), dim=3)
    return both.flatten(1, 2)
