"""Who decays, who is an expert, and that every rank counts groups alike."""

import torch
from torch.nn import Parameter

from moe_runtime.optim.groups import parameter_groups


def named_parameters() -> list[tuple[str, Parameter]]:
    params = {
        "embed.weight": Parameter(torch.zeros(8, 4)),
        "layers.0.attn_norm.weight": Parameter(torch.zeros(4)),
        "layers.0.moe.router.weight": Parameter(torch.zeros(2, 4)),
        "layers.0.moe.experts.gate_up": Parameter(torch.zeros(2, 6, 4)),
        "layers.0.moe.experts.down": Parameter(torch.zeros(2, 4, 3)),
        "norm.weight": Parameter(torch.zeros(4)),
        "head.weight": Parameter(torch.zeros(8, 4)),
    }
    for name in params:
        if ".experts." in name:
            params[name].is_expert = True  # type: ignore[attr-defined]
    return list(params.items())


def test_gains_do_not_decay_and_everything_else_does_in_the_order_given() -> None:
    named = named_parameters()
    names = {param: name for name, param in named}
    groups = parameter_groups(named, 0.1, "experts")
    found = [(g["name"], g["weight_decay"], g["moe"], [names[p] for p in g["params"]]) for g in groups]
    assert found == [
        ("dense", 0.1, False, ["embed.weight", "layers.0.moe.router.weight", "head.weight"]),
        ("dense_no_decay", 0.0, False, ["layers.0.attn_norm.weight", "norm.weight"]),
        ("experts", 0.1, True, ["layers.0.moe.experts.gate_up", "layers.0.moe.experts.down"]),
    ]


def test_group_ids_do_not_depend_on_which_groups_are_empty() -> None:
    named = named_parameters()
    everywhere = {g["name"]: g["group_id"] for g in parameter_groups(named, 0.1, "experts")}
    experts_only = parameter_groups([(n, p) for n, p in named if ".experts." in n], 0.1, "experts")
    assert everywhere == {"dense": 0, "dense_no_decay": 1, "experts": 2}
    assert [(g["name"], g["group_id"]) for g in experts_only] == [("experts", 2)]


def test_an_expert_gain_has_a_name_of_its_own() -> None:
    gain = Parameter(torch.zeros(3))
    gain.is_expert = True  # type: ignore[attr-defined]
    assert [g["name"] for g in parameter_groups([("g", gain)], 0.1, "experts")] == ["experts_no_decay"]


def test_frozen_parameters_are_in_no_group() -> None:
    frozen = Parameter(torch.zeros(3, 3), requires_grad=False)
    assert parameter_groups([("frozen", frozen)], 0.1, "experts") == []
