"""Parameter groups as ZeRO needs them: complete, in one order everywhere, and equal on all replicas.

Ranks that reduce a group together walk it in the same order, and cut the flat vector at the same
places. A different order would add gradients of different parameters without any error, so it is
looked for once, when the optimizer is built.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import Optimizer

from moe_runtime.errors import NumericsError

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def complete_groups(groups: Sequence[dict[str, Any]], names: dict[Parameter, str]) -> list[dict[str, Any]]:
    """Groups in registration order, named and marked as DeepSpeed wants them, without empty ones.

    Expert parameters get `allreduce = False` and `group_name`, their groups `moe = True`: that is how
    DeepSpeed knows that they are reduced over the expert-data-parallel group.
    """
    rank_of = {param: i for i, param in enumerate(names)}
    seen = [param for group in groups for param in group["params"]]
    assert len(seen) == len(set(seen)) and set(seen) == set(names), "groups must hold each parameter once"
    kept = []
    for i, group in enumerate(groups):
        params = sorted(group["params"], key=rank_of.__getitem__)
        if not params:
            continue
        assert len({p.dtype for p in params}) == 1, f"group {i} mixes dtypes"
        experts = [bool(getattr(p, "is_expert", False)) for p in params]
        assert all(experts) or not any(experts), f"group {i} mixes experts with other parameters"
        name = group.get("name", f"group{i}")
        for param in params if experts[0] else ():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = name  # type: ignore[attr-defined]
        # Its place among all groups, also those that are empty here: the same number on every rank.
        kept.append({"group_id": i, **group, "params": params, "name": name, "moe": experts[0]})
    return kept


def make_client(
    make_optimizer: Callable[[list[dict[str, Any]]], Optimizer], groups: list[dict[str, Any]]
) -> Optimizer:
    """A client that never meets the model's weights: DeepSpeed wants them in its groups, then replaces them.

    It is made with stand-ins of the kind that it will work on, for it may refuse BF16.
    """
    client = make_optimizer(
        [{**group, "params": [group["params"][0].new_zeros(2, dtype=torch.float32)]} for group in groups]
    )
    for own, group in zip(client.param_groups, groups, strict=True):
        own["params"] = list(group["params"])
    return client


def owners_of(
    group: dict[str, Any], dp_group: dist.ProcessGroup, expert_dp_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    """The ranks that share a completed group's flat vector."""
    if not group["moe"]:
        return dp_group
    assert expert_dp_group is not None, f"group {group['name']} holds experts, but there is no expert group"
    return expert_dp_group


def check_replicas(
    group: str, params: Sequence[Parameter], names: dict[Parameter, str], owners: dist.ProcessGroup
) -> None:
    """Compare names, order and weights of a group over the ranks that share it; a collective call.

    Raises:
        NumericsError: they differ; raised on all ranks alike.
    """
    digest = _digest(params, names)
    ends = torch.tensor([digest, -digest], device=params[0].device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=owners)
    if int(ends[0]) != -int(ends[1]):
        raise NumericsError(
            f"ranks {dist.get_process_group_ranks(owners)}, group {group}: weights or their order differ, "
            "expected the same; register parameters in ascending stage id and initialise from one seed"
        )


def _digest(params: Sequence[Parameter], names: dict[Parameter, str]) -> int:
    """A number that replicas share when they hold the same bits under the same names in the same order."""
    digest = hashlib.sha256()
    for param in params:
        words = param.detach().contiguous().view(_WORDS[param.element_size()])
        digest.update(f"{names[param]} {tuple(param.shape)} {int(words.sum(dtype=torch.int64))};".encode())
    return int.from_bytes(digest.digest()[:7], "big")
