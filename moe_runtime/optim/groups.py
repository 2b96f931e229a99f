"""Which parameters decay, which are experts, which is tied: five groups, in one order everywhere.

ZeRO flattens each group to one vector, so what is treated alike must be together: experts are reduced
over fewer ranks than the rest, and gains of norms do not decay. The report states one weight decay of
0.1 and names no exception; leaving one-dimensional gains out is the custom of the field and ours. All
matrices decay: projections, experts, the router, embedding and head. Ref: DSV3 §4.2

An embedding of which two pipeline stages hold a copy is alone in its group, so that its flat vector is
cut and, with FP8 moments, rounded in the same places on both stages: the copies stay the same bits.
"""

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

DENSE_GROUP = "dense"
TIED_GROUP = "tied"
NO_DECAY_SUFFIX = "_no_decay"
# By group_id, as reports name them.
GROUP_NAMES = (
    DENSE_GROUP,
    DENSE_GROUP + NO_DECAY_SUFFIX,
    "experts",
    "experts" + NO_DECAY_SUFFIX,
    TIED_GROUP,
)


def parameter_groups(
    named_params: Iterable[tuple[str, Parameter]], weight_decay: float, expert_group_name: str
) -> list[dict[str, Any]]:
    """Group dicts for an optimizer: dense and experts, each with and without decay, and the tied one.

    Each has `params` in the order given, `name` (unique: `dense`, `dense_no_decay`, and
    `expert_group_name` alone and with the same suffix), `weight_decay`, `moe` (True for experts, as
    DeepSpeed wants it) and `group_id`, its place among the five. Empty groups are left out; the
    others keep their `group_id`, so a rank without experts numbers the rest as its peers do.

    Args:
        named_params: parameters of this rank; those with `is_expert` are experts, one with `is_tied`
            is tied. Frozen ones are left out.
        weight_decay: of the groups that decay.
        expert_group_name: what the expert-parallel process group is registered under.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [],
            "name": name if decays else name + NO_DECAY_SUFFIX,
            "weight_decay": weight_decay if decays else 0.0,
            "moe": place == 1,
            "group_id": 2 * place + (not decays),
        }
        for place, name in enumerate((DENSE_GROUP, expert_group_name))
        for decays in (True, False)
    ]
    tied = {"name": TIED_GROUP, "weight_decay": weight_decay, "moe": False, "group_id": len(groups)}
    groups.append({"params": []} | tied)
    for _, param in named_params:
        if param.requires_grad:
            place = 2 * int(getattr(param, "is_expert", False)) + (param.ndim <= 1)
            groups[-1 if getattr(param, "is_tied", False) else place]["params"].append(param)
    return [group for group in groups if group["params"]]
