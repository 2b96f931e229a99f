"""Compares what replicas hold: mirrored rows and lanes have equal weights and biases, bit for bit.

Each rank sends one 64-bit digest for each of its few flat groups, so a comparison costs one small gather.
It finds what digests at rest cannot: weights that were wrong from the moment they were written.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_runtime.parallel.at_rest import BIAS, WEIGHTS, Held, held_state
from moe_runtime.parallel.digest import digest
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer


@dataclass(frozen=True)
class Difference:
    """A tensor of which replicas hold different bits.

    Args:
        kind: `weights` or `bias`.
        group: of parameters; of a bias, its name.
        odd_ranks: those outvoted by the others; empty if there is no majority.
    """

    kind: str
    group: str
    odd_ranks: list[int]


def replica_differences(runtime: Runtime, optimizer: ZeroOptimizer) -> list[Difference]:
    """What this rank's replicas disagree on, alike on all of them; a collective call of all ranks."""
    held = [each for each in held_state(runtime, optimizer) if each.kind in (WEIGHTS, BIAS)]
    groups = runtime.groups
    dense = [each for each in held if not each.is_expert]
    experts = [each for each in held if each.is_expert]
    return [*_compare(dense, groups.data), *_compare(experts, groups.expert_data)]


def _compare(held: list[Held], group: dist.ProcessGroup) -> list[Difference]:
    size = dist.get_world_size(group)
    if size == 1 or not held:
        return []
    own = torch.cat([digest(each.tensor) for each in held])
    rows = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(rows, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    columns = torch.stack(rows).T.tolist()
    return [
        Difference(each.kind, each.group, _outvoted(column, ranks))
        for each, column in zip(held, columns, strict=True)
        if len(set(column)) > 1
    ]


def _outvoted(digests: list[int], ranks: list[int]) -> list[int]:
    """Ranks whose digest is not that of more than half."""
    (common, votes), *_ = Counter(digests).most_common(1)
    if 2 * votes <= len(digests):
        return []
    return [rank for rank, found in zip(ranks, digests, strict=True) if found != common]
