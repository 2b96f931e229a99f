"""Merging a forward and a backward: order within each half, and what flies under what."""

from collections.abc import Sequence

import pytest

from moe_runtime.parallel.stage import Step
from moe_runtime.schedule.interleave import interleave

FORWARD = ("attend", "dispatch", "shared", "experts", "combine")
BACKWARD = (
    "combine_b",
    "shared_b",
    "shared_w",
    "experts_b",
    "experts_w",
    "dispatch_b",
    "attend_b",
    "attend_w",
)


def _steps(*blocks: tuple[str, Sequence[str]]) -> list[Step]:
    return [Step(label, layer, lambda: None) for layer, labels in blocks for label in labels]


def _moe_forward(layer: str) -> tuple[str, Sequence[str]]:
    return layer, FORWARD


def _moe_backward(layer: str) -> tuple[str, Sequence[str]]:
    return layer, BACKWARD


FORWARDS = {
    "two MoE": _steps(_moe_forward("layers.1"), _moe_forward("layers.2")),
    "embed, dense, MoE, merge": _steps(
        ("embed", ["embed"]), ("layers.0", ["dense"]), _moe_forward("layers.1"), ("layers.1", ["merge"])
    ),
    "dense": _steps(("layers.0", ["dense"])),
    "head and MTP": _steps(
        _moe_forward("layers.3"),
        ("layers.3", ["merge"]),
        ("norm", ["norm"]),
        ("head", ["loss"]),
        ("mtp.0", ["mtp_in"]),
        _moe_forward("mtp.0.block"),
        ("mtp.0.block", ["merge"]),
        ("mtp.0", ["norm", "loss"]),
    ),
}
BACKWARDS = {
    "two MoE": _steps(_moe_backward("layers.2"), _moe_backward("layers.1")),
    "dense": _steps(("layers.0", ["dense_b", "dense_w"])),
    "merge, MoE, dense, embed": _steps(
        ("layers.1", ["merge_b", "merge_w"]),
        _moe_backward("layers.1"),
        ("layers.0", ["dense_b", "dense_w"]),
        ("embed", ["embed_b", "embed_w"]),
    ),
}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_every_step_runs_once_and_forwards_keep_their_order(forward: str, backward: str) -> None:
    ahead, back = FORWARDS[forward], BACKWARDS[backward]
    merged = interleave(ahead, back)
    assert sorted(map(id, merged)) == sorted(map(id, ahead + back))
    assert [step for step in merged if step in ahead] == ahead


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_backward_keeps_its_order_up_to_weight_gradients(forward: str, backward: str) -> None:
    merged = [s for s in interleave(FORWARDS[forward], BACKWARDS[backward]) if s in BACKWARDS[backward]]
    chain = [step for step in BACKWARDS[backward] if not step.label.endswith("_w")]
    assert [step for step in merged if step in chain] == chain
    for step in BACKWARDS[backward]:
        if step.label.endswith("_w"):
            source = next(s for s in chain if s.layer == step.layer and s.label == step.label[:-2] + "_b")
            assert merged.index(source) < merged.index(step)


def _flies_under(merged: Sequence[Step], start: tuple[str, str], wait: tuple[str, str]) -> list[str]:
    """Labels of the computation between a start and what waits for it, each a (label, layer)."""
    names = [(step.label, step.layer) for step in merged]
    between = names[names.index(start) + 1 : names.index(wait)]
    return [label for label, _ in between if not label.startswith(("dispatch", "combine"))]


def test_each_exchange_of_a_pair_flies_under_computation_of_the_other_half() -> None:
    merged = interleave(FORWARDS["two MoE"], BACKWARDS["two MoE"])
    under = lambda *ends: _flies_under(merged, *ends)  # noqa: E731
    assert "attend" in under(("combine_b", "layers.2"), ("experts_b", "layers.2"))
    assert "experts_b" in under(("dispatch", "layers.1"), ("experts", "layers.1"))
    assert "experts" in under(("dispatch_b", "layers.2"), ("attend_b", "layers.2"))
    assert {"attend_b", "attend_w", "experts_w"} <= set(
        under(("combine", "layers.1"), ("attend", "layers.2"))
    )
    assert {"attend_w", "experts_w"} <= set(under(("combine_b", "layers.1"), ("experts_b", "layers.1")))


def test_the_last_combine_of_a_forward_flies_under_the_rest_of_the_backward() -> None:
    merged = interleave(FORWARDS["embed, dense, MoE, merge"], BACKWARDS["merge, MoE, dense, embed"])
    under = _flies_under(merged, ("combine", "layers.1"), ("merge", "layers.1"))
    assert {"attend_b", "attend_w", "experts_w", "dense_b", "embed_b"} <= set(under)


def test_a_backward_without_a_partner_hides_exchanges_under_its_weight_gradients() -> None:
    merged = interleave((), BACKWARDS["two MoE"])
    assert "experts_w" in _flies_under(merged, ("dispatch_b", "layers.2"), ("attend_b", "layers.2"))
    assert "attend_w" in _flies_under(merged, ("combine_b", "layers.1"), ("experts_b", "layers.1"))


def test_surplus_and_unequal_blocks_run_alone() -> None:
    merged = [step.label for step in interleave(FORWARDS["head and MTP"], BACKWARDS["dense"])]
    assert merged == [s.label for s in BACKWARDS["dense"] + FORWARDS["head and MTP"]]
