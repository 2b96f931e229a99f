"""Expert placement for balance: where to put experts, and spare copies of busy ones, given measured loads.

Routers that are not forced to balance load experts unequally, and the rank with the most rows sets the
time of a step for all. Two remedies, both functions of load statistics alone: spread busy and idle experts
over the ranks, and give busy ones more copies (*slots* beyond the number of experts).

    loads      [layers, experts]            rows seen per expert, e.g. over the last thousand steps
    slots      rank 0 | rank 1 | ...        equally many on each rank; slot -> expert is what is wanted
    objective  load of the heaviest rank / mean load of a rank; 1 is perfect

A token's rows of an expert are taken to be spread equally over its copies.

Two forms. *Hierarchical*: whole routing groups go to nodes, as group-limited routing and the two-hop
dispatcher want; then each node is a problem of its own. Its balance is bounded by that of the groups.
*Global*: any expert on any rank; better balanced, and for exchanges without nodes. `auto` takes the
hierarchical form where groups divide over several nodes.

The search is in `moe_comm.replicas`. All of it is deterministic arithmetic in FP64 on the CPU; yet
processors of different make may round sums differently, so let one rank decide and broadcast
`slot_experts`.

Ref: DSV3 §3.4 (redundant experts; the report uses them for inference)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.errors import PlacementError
from moe_comm.replicas.grouping import keep_groups, members_of, part_loads, place_groups
from moe_comm.replicas.layout import (
    ExpertLayout,
    layer_rank_loads,
    max_over_mean,
    measure_layout,
    node_loads,
    plain_ranks,
    split_load,
)
from moe_comm.replicas.packing import pack
from moe_comm.replicas.relocation import Move, count_moved, relocate

FORMS = ("auto", "hierarchical", "global")


@dataclass(frozen=True)
class RebalanceSummary:
    """A re-placement in a few numbers; ratios are of the heaviest to the mean.

    Args:
        form: "hierarchical" or "global".
        before: of ranks in the plain layout, mean over layers.
        before_worst: the worst layer's.
        after: of ranks when re-placed, mean over layers.
        after_worst: the worst layer's.
        node_before: of nodes in the plain layout, mean over layers.
        node_after: of nodes when re-placed, mean over layers.
        bound: what `after` cannot fall below with the experts of each node given.
        replicas: slots of a layer beyond one an expert.
        most_copies: of any expert.
        moved: slots, of all layers, whose expert was not on that rank before: in `previous`, or in the
            plain layout.
    """

    form: str
    before: float
    before_worst: float
    after: float
    after_worst: float
    node_before: float
    node_after: float
    bound: float
    replicas: int
    most_copies: int
    moved: int


def rebalance(
    loads: Tensor,
    num_slots: int,
    *,
    ranks_per_node: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    form: str = "auto",
    previous: Tensor | None = None,
    slack: float = 0.0,
) -> ExpertLayout:
    """Choose the expert of every slot so that the heaviest rank is as light as possible.

    No rank gets two copies of one expert.

    Args:
        loads: int or float [layers, experts], not negative.
        num_slots: slots of a layer over all ranks; at least as many as experts, a multiple of the ranks.
        ranks_per_node: ranks of each node.
        num_nodes: machines.
        num_groups: routing groups; group g is the g-th equal part of the experts.
        form: "hierarchical", "global", or "auto": hierarchical for several nodes where it is possible.
        previous: int64 [layers, num_slots], the `slot_experts` in use. The result is as balanced as it
            would be without, and of several ways to get there the one with the fewest moves is taken.
        slack: with `previous`, how much heavier the heaviest rank may be for the sake of fewer moves:
            0.02 is 2% heavier than without `previous`.

    Raises:
        PlacementError: the numbers do not fit together; says which.
    """
    _check(loads, num_slots, num_nodes, ranks_per_node, slack)
    form = _choose_form(form, loads.shape[1], num_slots, num_nodes, ranks_per_node, num_groups)
    exact = loads.detach().to("cpu", torch.float64)
    layers, num_experts = exact.shape
    parts, groups = (num_nodes, num_groups) if form == "hierarchical" else (1, 1)
    ranks = num_nodes * ranks_per_node // parts
    shape = (layers, parts, ranks, num_slots // (parts * ranks))
    held = None if previous is None else _check_previous(previous, num_experts, shape)
    part_groups = place_groups(exact, groups, parts)
    members = members_of(part_groups, groups, num_experts)
    needed = part_loads(exact, members).amax(1) / ranks  # the heaviest node's; the others may be as heavy
    experts = pack(
        exact.repeat_interleave(parts, 0),
        members.flatten(0, 1),
        needed.repeat_interleave(parts),
        (num_slots // parts, ranks),
    )
    experts = experts.view(shape).sort(3).values
    moved = torch.zeros(layers, dtype=torch.int64)
    if held is not None:
        kept, whole = keep_groups(exact, held, part_groups, groups, slack)
        goal = layer_rank_loads(exact, experts).amax(1) * (1.0 + slack)
        move = Move(exact, held, members_of(kept, groups, num_experts), whole, goal)
        experts = relocate(experts, move)
        moved = count_moved(experts, held, num_experts)
    return measure_layout(exact, experts, form, (num_nodes, ranks_per_node), moved)


def describe_rebalance(
    loads: Tensor,
    num_slots: int,
    *,
    ranks_per_node: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    form: str = "auto",
    previous: Tensor | None = None,
    slack: float = 0.0,
) -> RebalanceSummary:
    """Re-place and sum up what that gains; arguments and errors as in `rebalance`."""
    layout = rebalance(
        loads,
        num_slots,
        ranks_per_node=ranks_per_node,
        num_nodes=num_nodes,
        num_groups=num_groups,
        form=form,
        previous=previous,
        slack=slack,
    )
    split = split_load(loads, layout)
    before = max_over_mean(split.before)
    return RebalanceSummary(
        form=layout.form,
        before=float(before.mean()),
        before_worst=float(before.max()),
        after=float(layout.max_over_mean.mean()),
        after_worst=float(layout.max_over_mean.max()),
        node_before=float(max_over_mean(node_loads(split.before, num_nodes)).mean()),
        node_after=float(layout.node_max_over_mean.mean()),
        bound=float(layout.bound.mean()),
        replicas=num_slots - loads.shape[1],
        most_copies=int(layout.replicas.max()),
        moved=int(layout.moved.sum()) if previous is not None else _moved_from_plain(layout),
    )


def _check(loads: Tensor, num_slots: int, num_nodes: int, ranks_per_node: int, slack: float) -> None:
    if loads.dim() != 2 or 0 in loads.shape or loads.dtype == torch.bool or loads.is_complex():
        raise PlacementError(
            f"rebalance: expected loads [layers, experts] of numbers, got {loads.dtype} {list(loads.shape)}"
        )
    if not bool((loads >= 0).all() and loads.double().sum(1).isfinite().all()):
        raise PlacementError(
            "rebalance: expected finite loads of 0 or more; look for a NaN or a negative one"
        )
    if num_nodes < 1 or ranks_per_node < 1:
        raise PlacementError(
            f"rebalance: expected at least 1 node and 1 rank a node, got {num_nodes} and {ranks_per_node}"
        )
    experts, ranks = loads.shape[1], num_nodes * ranks_per_node
    if num_slots < experts:
        raise PlacementError(
            f"rebalance: {num_slots} slots cannot hold {experts} experts; "
            f"use {_fitting(experts, ranks)} slots or more"
        )
    if num_slots % ranks:
        fewer = num_slots // ranks * ranks
        fitting = f"{fewer} or " * (fewer >= experts) + str(_fitting(num_slots, ranks))
        raise PlacementError(f"rebalance: {num_slots} slots do not divide over {ranks} ranks; use {fitting}")
    if num_slots > experts * ranks:
        raise PlacementError(
            f"rebalance: {num_slots // ranks} slots a rank for {experts} experts would hold one twice; "
            f"use at most {experts * ranks} slots"
        )
    if not 0 <= slack < float("inf"):
        raise PlacementError(f"rebalance: expected a finite slack of 0 or more, got {slack}")


def _fitting(least: int, multiple: int) -> int:
    return -(-least // multiple) * multiple


def _choose_form(
    form: str, num_experts: int, num_slots: int, num_nodes: int, ranks_per_node: int, num_groups: int
) -> str:
    """The form to use; refuses a hierarchical one that cannot be, unless the choice is open."""
    if form not in FORMS:
        raise PlacementError(f"rebalance: expected a form of {', '.join(FORMS)}, got {form!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise PlacementError(
            f"rebalance: {num_experts} experts do not divide over {num_groups} routing groups"
        )
    if form == "global":
        return form
    obstacle = ""
    if num_groups % num_nodes:
        obstacle = f"{num_groups} routing groups do not divide over {num_nodes} nodes"
    elif num_slots > num_experts * ranks_per_node:
        obstacle = f"{num_slots // (num_nodes * ranks_per_node)} slots a rank would hold an expert twice"
    if form == "hierarchical" and obstacle:
        raise PlacementError(f"rebalance: {obstacle}; use form 'global'")
    return "global" if obstacle or (num_nodes == 1 and form == "auto") else "hierarchical"


def _check_previous(previous: Tensor, num_experts: int, shape: tuple[int, int, int, int]) -> Tensor:
    """The placement in use, int64 [layers, parts, ranks, slots]."""
    layers, parts, ranks, slots = shape
    expected = [layers, parts * ranks * slots]
    if list(previous.shape) != expected or previous.dtype != torch.int64:
        raise PlacementError(
            f"rebalance: expected previous int64 {expected}, got {previous.dtype} {list(previous.shape)}"
        )
    held = previous.detach().cpu().reshape(shape)
    if int(held.min()) < 0 or int(held.max()) >= num_experts:
        raise PlacementError(f"rebalance: previous holds an expert that is not in 0..{num_experts - 1}")
    ordered = held.sort(3).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise PlacementError("rebalance: previous holds two copies of one expert on one rank; omit it once")
    return held


def _moved_from_plain(layout: ExpertLayout) -> int:
    layers, num_slots = layout.slot_experts.shape
    ranks = torch.arange(num_slots) // (num_slots // layout.num_ranks)
    plain = plain_ranks(layout.replicas.shape[1], layout.num_ranks)
    return layers * num_slots - int((plain[layout.slot_experts] == ranks).sum())
