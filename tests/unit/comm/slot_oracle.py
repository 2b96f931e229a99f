"""Placements of expert copies looked at and found by plain loops: slow, and free of the library's code."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement


def ranks_of(slot_experts: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The experts of each rank."""
    per_rank = len(slot_experts) // num_ranks
    return [list(slot_experts[rank * per_rank : (rank + 1) * per_rank]) for rank in range(num_ranks)]


def rank_loads_of(loads: Sequence[float], slot_experts: Sequence[int], num_ranks: int) -> list[float]:
    """Load of each rank when an expert's load is spread equally over its copies."""
    copies = Counter(slot_experts)
    return [sum(loads[e] / copies[e] for e in experts) for experts in ranks_of(slot_experts, num_ranks)]


def max_over_mean_of(bins: Sequence[float]) -> float:
    """Heaviest over mean, 1 without load."""
    return max(bins) * len(bins) / sum(bins) if sum(bins) else 1.0


def faults_of(slot_experts: Sequence[int], num_experts: int, num_ranks: int) -> list[str]:
    """What is wrong with a placement, in words."""
    faults = [f"expert {e} is nowhere" for e in range(num_experts) if e not in slot_experts]
    for rank, experts in enumerate(ranks_of(slot_experts, num_ranks)):
        faults += [f"rank {rank} holds expert {e} twice" for e, n in Counter(experts).items() if n > 1]
    return faults


def group_faults_of(
    slot_experts: Sequence[int], num_experts: int, num_nodes: int, num_groups: int
) -> list[str]:
    """Groups that are not whole on one node, and nodes with more groups than others."""
    size = num_experts // num_groups
    homes: dict[int, set[int]] = {}
    for slot, expert in enumerate(slot_experts):
        homes.setdefault(expert // size, set()).add(slot * num_nodes // len(slot_experts))
    faults = [f"group {g} is on nodes {sorted(nodes)}" for g, nodes in homes.items() if len(nodes) > 1]
    crowds = Counter(min(nodes) for nodes in homes.values())
    return faults + [f"node {n} has {c} groups" for n, c in crowds.items() if c * num_nodes != num_groups]


def best_load(loads: Sequence[float], num_slots: int, num_ranks: int) -> float:
    """The lightest possible heaviest rank, by trying every set of experts on every rank."""
    best = float("inf")
    sets = list(combinations(range(len(loads)), num_slots // num_ranks))
    for chosen in combinations_with_replacement(sets, num_ranks):
        slots = [expert for experts in chosen for expert in experts]
        if len(set(slots)) == len(loads):
            best = min(best, max(rank_loads_of(loads, slots, num_ranks)))
    return best


def best_load_by_groups(
    loads: Sequence[float], num_slots: int, num_nodes: int, ranks_per_node: int, num_groups: int
) -> float:
    """The same where groups stay whole: every way to give them to nodes, each node on its own."""
    size = len(loads) // num_groups
    best = float("inf")
    for parts in _partitions(tuple(range(num_groups)), num_groups // num_nodes):
        heaviest = 0.0
        for groups in parts:
            local = [loads[g * size + i] for g in groups for i in range(size)]
            heaviest = max(heaviest, best_load(local, num_slots // num_nodes, ranks_per_node))
        best = min(best, heaviest)
    return best


def _partitions(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    if not items:
        yield []
        return
    for rest in combinations(items[1:], size - 1):
        left = tuple(item for item in items[1:] if item not in rest)
        for others in _partitions(left, size):
            yield [(items[0], *rest), *others]


def plain_greedy(loads: Sequence[float], num_slots: int, num_ranks: int) -> list[int]:
    """The textbook way: spare slots to the largest share, then each copy to the lightest rank with room."""
    copies = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda e: loads[e] / copies[e])
        copies[busiest] += 1
    todo = sorted((-loads[e] / copies[e], e) for e in range(len(loads)) for _ in range(copies[e]))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    weights = [0.0] * num_ranks
    for negative, expert in todo:
        open_ranks = [r for r in range(num_ranks) if len(ranks[r]) < num_slots // num_ranks]
        lightest = min(open_ranks, key=lambda r: weights[r])
        ranks[lightest].append(expert)
        weights[lightest] -= negative
    return [expert for experts in ranks for expert in experts]
