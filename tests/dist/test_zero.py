"""DeepSpeed ZeRO behind our door, against plain torch AdamW over the whole model in one process.

Four ranks run all cases in one world; the tests then look at what they found.
"""

import gc
import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from moe_runtime.errors import CheckpointError, ConfigError, NumericsError
from moe_runtime.parallel.zero import ZeroOptimizer
from tests.dist.zero_world import (
    EXPERTS,
    LAYOUTS,
    LR,
    STEPS,
    WORLD,
    ByClass,
    Layout,
    World,
    accumulate,
    digest,
    gradient,
    identity,
    make_params,
    reference,
    train,
)
from tests.ranks import run_ranks

CASES = [
    ("dp4_ep2", torch.float32, 1, 0.5),
    ("dp4_ep2", torch.bfloat16, 1, 0.5),
    ("dp4_ep2", torch.float32, 2, 0.5),
    ("dp4_ep2", torch.bfloat16, 2, 0.0),
    ("mirrored_dp2_ep2", torch.float32, 1, 0.0),
    ("mirrored_dp2_ep2", torch.bfloat16, 1, 0.5),
    ("mirrored_pp4", torch.float32, 1, 0.5),
    ("one_way_pp2", torch.float32, 1, 0.5),
    ("large_dp4", torch.float32, 2, 0.5),
]


def case_name(case: tuple[str, torch.dtype, int, float]) -> str:
    layout, dtype, stage, clip = case
    return f"{layout}-{str(dtype)[6:]}-zero{stage}-clip{clip}"


def compare(world: World, case: tuple[str, torch.dtype, int, float], early: bool = False) -> dict[str, Any]:
    """Worst distance from the reference: of master slices, of norms; and whether weights are the masters."""
    layout, dtype, stage, clip = LAYOUTS[case[0]], *case[1:]
    named = make_params(layout, world.rank, dtype)
    zero = world.open(layout, named, stage, clip, bucket_elements=2**20 if case[0] == "large_dp4" else 100)
    results = train(layout, zero, named, range(STEPS), early=early)
    expected, norms, by_class, updates = reference(layout, dtype, clip, STEPS)
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    error = 0.0
    for name, param in named:
        want = expected[identity(layout, name, world.rank)]
        error = max(error, float((param.detach() - want).abs().max() / want.abs().max()) - rounding)
    return {
        "param_error": error,
        "norm_error": max(abs(r.grad_norm / n - 1) for r, n in zip(results, norms, strict=True)),
        "class_error": farthest([r.grad_norms for r in results], by_class),
        "update_error": farthest([r.updates or {} for r in results], updates),
        "clipped": [r.clipped for r in results],
        "skipped": any(r.skipped for r in results),
        "weights": {identity(layout, name, world.rank): digest(param) for name, param in named},
    }


def farthest(found: list[ByClass], wanted: list[ByClass]) -> float:
    """Largest relative distance of a number from the reference; infinite where classes differ."""
    pairs = list(zip(found, wanted, strict=True))
    if any(ours.keys() != theirs.keys() for ours, theirs in pairs):
        return math.inf
    return max(abs(ours[name] / theirs[name] - 1) for ours, theirs in pairs for name in theirs)


def snapshot(zero: ZeroOptimizer) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Copies of this rank's masters and of the client's state, by group."""
    return {
        part.group: (
            part.master.detach().clone(),
            {key: value.clone() for key, value in zero.client.native_state(part.master).items()},
        )
        for part in zero.partitions()
    }


def same_bits(a: Any, b: Any) -> bool:
    return all(
        torch.equal(a[group][0], b[group][0])
        and all(torch.equal(value, b[group][1][key]) for key, value in a[group][1].items())
        for group in a
    )


def skip_non_finite(world: World) -> dict[str, Any]:
    """One infinite gradient on rank 2, in the second of three steps."""
    layout = LAYOUTS["mirrored_pp4"]
    named = make_params(layout, world.rank, torch.bfloat16)
    zero = world.open(layout, named, clip=0.5)
    train(layout, zero, named, range(1))
    before = snapshot(zero)
    if world.rank == 2:
        named[0][1].grad_accum.view(-1)[0] = math.inf
    result = zero.step(LR)
    same = same_bits(before, snapshot(zero))
    after = train(layout, zero, named, range(1, 2))
    return {"skipped": result.skipped, "same": same, "went_on": not after[0].skipped}


def continue_from_saved(world: World, layout_name: str, dtype: torch.dtype, stage: int, moments: str) -> bool:
    """Two steps, save, a new optimizer, load, one step: the same bits as three steps."""
    layout = LAYOUTS[layout_name]
    named = make_params(layout, world.rank, dtype)
    zero = world.open(layout, named, stage, 0.5, moments)
    train(layout, zero, named, range(2))
    saved = snapshot(zero)
    train(layout, zero, named, range(2, 3))
    fresh = make_params(layout, world.rank, dtype)
    again = world.open(layout, fresh, stage, 0.5, moments)
    for group, (master, native) in saved.items():
        again.load_partition(group, master, native)
    again.refresh_weights()
    train(layout, again, fresh, range(2, 3))
    weights = zip(named, fresh, strict=True)
    return same_bits(snapshot(zero), snapshot(again)) and all(torch.equal(a, b) for (_, a), (_, b) in weights)


def owned_pieces(world: World) -> dict[str, list[tuple[int, int]]]:
    """Which range of each parameter this rank owns, after checking that masters hold those values."""
    layout = LAYOUTS["dp4_ep2"]
    named = make_params(layout, world.rank, torch.float32)
    zero = world.open(layout, named)
    weights, owned = dict(named), {}
    for partition, group in zip(zero.partitions(), zero.client.param_groups, strict=True):
        assert group["params"][0] is partition.master and group["offset"] == partition.start
        for piece in partition.pieces():
            part = partition.master[piece.local : piece.local + piece.numel]
            assert torch.equal(part, weights[piece.name].detach().flatten()[piece.begin : piece.end])
            owned[identity(layout, piece.name, world.rank)] = (piece.begin, piece.end)
    return owned


def live_bytes() -> int:
    """Bytes of all distinct floating-point storages that Python can reach.

    The least of a few looks: a transport's thread may let go of what it sent a little later.
    """
    looks = []
    for _ in range(4):
        time.sleep(0.01)
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, Parameter) and t.is_floating_point()]
        looks.append(
            sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        )
    return min(looks)


def gradient_memory(world: World, stage: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that appear between microbatches, and what a partition and a full set would be."""
    layout = Layout(((0,),), dp=4, ep=2, shapes={0: {"weight": (300, 97), "gain": (101,)} | EXPERTS})
    named = make_params(layout, world.rank, dtype)
    zero = world.open(LAYOUTS["dp4_ep2"], named, stage)
    before = live_bytes()
    seen = []
    for mb in range(2):
        for name, param in named:
            accumulate(param, gradient(layout, name, world.rank, 0, mb, tuple(param.shape)))
        zero.end_microbatch()
        seen.append(live_bytes() - before)
    partition = sum(p.master.numel() for p in zero.partitions()) * 4
    full = sum(p.numel() for _, p in named) * 4
    zero.step(LR)
    return {"seen": max(seen), "partition": partition, "full": full}


def refusals(world: World) -> dict[str, str]:
    """Messages of the errors that all ranks must raise alike."""
    said = {}
    layout = LAYOUTS["dp4_ep2"]
    named = make_params(layout, world.rank, torch.float64)
    zero = world.open(layout, named)
    for name, param in named:
        if not (name.endswith("one") and world.rank == 1):
            accumulate(param, gradient(layout, name, world.rank, 0, 0, tuple(param.shape)))
    _, norms, *_ = reference(layout, torch.float32, 0.0, 1, microbatches=1)
    said["fp64_norm"] = str(abs(zero.reduce() / norms[0] - 1))
    with pytest.raises(ConfigError) as caught:
        zero.step(LR)
    said["fp64"] = str(caught.value)
    pipe = LAYOUTS["mirrored_pp4"]
    with pytest.raises(ConfigError) as caught:
        world.open(pipe, make_params(pipe, world.rank, torch.float32), stage=2)
    said["stage2"] = str(caught.value)
    named = make_params(layout, world.rank, torch.float32)
    with pytest.raises(NumericsError) as lost:
        world.open(layout, named[::-1] if world.rank == 1 else named)
    said["order"] = str(lost.value)
    zero = world.open(layout, named)
    with pytest.raises(CheckpointError) as bad:
        zero.load_partition("dense", torch.zeros(3), None)
    said["size"] = str(bad.value)
    with pytest.raises(CheckpointError) as bad:
        zero.load_partition("nothing", torch.zeros(3), None)
    said["group"] = str(bad.value)
    for name, param in named:
        accumulate(param, gradient(layout, name, world.rank, 0, 0, tuple(param.shape)))
    zero.reduce()
    zero._grad_norm *= 1.001  # type: ignore[operator]
    with pytest.raises(NumericsError) as lost:
        zero.step(LR)
    said["norm"] = str(lost.value)
    return said


RESUMED = [
    ("dp4_ep2", torch.bfloat16, 1, "fp8"),
    ("dp4_ep2", torch.float32, 2, "fp32"),
    ("one_way_pp2", torch.bfloat16, 1, "bf16"),
]


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    gc.freeze()  # what was imported so far need not be searched for tensors
    world = World(rank)
    found: dict[str, Any] = {case_name(case): compare(world, case) for case in CASES}
    found["early"] = compare(world, CASES[2], early=True)
    found["skip"] = skip_non_finite(world)
    found["saved"] = {key: continue_from_saved(world, *key) for key in RESUMED}
    found["pieces"] = owned_pieces(world)
    found["memory"] = {
        str(dtype): gradient_memory(world, 2, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    found["stage1_memory"] = gradient_memory(world, 1, torch.float32)
    found["refusals"] = refusals(world)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(all_cases, WORLD)


def single_rank(rank: int, world_size: int) -> float:
    group = dist.group.WORLD
    assert group is not None
    param = Parameter(torch.ones(5))
    zero = ZeroOptimizer(
        [("w", param)],
        groups=[{"params": [param]}],
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        dp_group=group,
        norm_group=group,
    )
    accumulate(param, torch.full((5,), 2.0))
    zero.end_microbatch()
    assert zero.step(0.25).grad_norm == pytest.approx(math.sqrt(20))
    return float(param.sum())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_three_steps_equal_plain_adamw_over_the_whole_model(ranks: list[dict[str, Any]], case: Any) -> None:
    for found in ranks:
        assert found[case_name(case)]["param_error"] <= 1e-6
        assert not found[case_name(case)]["skipped"]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_norm_counts_every_distinct_parameter_once(ranks: list[dict[str, Any]], case: Any) -> None:
    for found in ranks:
        assert found[case_name(case)]["norm_error"] <= 1e-6
        assert all(found[case_name(case)]["clipped"]) == (case[3] > 0)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_norms_and_updates_are_told_by_class_of_parameter(ranks: list[dict[str, Any]], case: Any) -> None:
    # A large piece is sampled: 2^14 elements tell a ratio of two sizes to 1% or so.
    tolerance = 0.03 if case[0] == "large_dp4" else 1e-3
    for found in ranks:
        assert found[case_name(case)]["class_error"] <= 1e-6
        assert found[case_name(case)]["update_error"] <= tolerance


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_all_holders_of_a_parameter_hold_the_same_bits(ranks: list[dict[str, Any]], case: Any) -> None:
    held: dict[str, str] = {}
    for found in ranks:
        for name, values in found[case_name(case)]["weights"].items():
            assert held.setdefault(name, values) == values


def test_gradients_may_be_released_before_the_microbatch_ends(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["early"]["param_error"] <= 1e-6


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["skip"] == {"skipped": True, "same": True, "went_on": True}


def test_training_from_saved_partitions_continues_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert all(found["saved"].values()), found["saved"]


def test_owned_pieces_cover_every_parameter_once(ranks: list[dict[str, Any]]) -> None:
    owned: dict[str, list[tuple[int, int]]] = {}
    for found in ranks:
        for name, piece in found["pieces"].items():
            owned.setdefault(name, []).append(piece)
    layout = LAYOUTS["dp4_ep2"]
    for rank in range(WORLD):
        for name, shape in layout.names(rank).items():
            pieces = sorted(owned[identity(layout, name, rank)])
            assert [0, *(end for _, end in pieces)] == [*(begin for begin, _ in pieces), math.prod(shape)]


def test_stage_2_keeps_only_its_partition_of_gradients_between_microbatches(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        for memory in found["memory"].values():
            assert memory["seen"] <= memory["partition"] < memory["full"] / 2
        assert found["stage1_memory"]["seen"] == 0  # its accumulators are there from the start


def test_mistakes_are_refused_on_all_ranks_alike(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        said = found["refusals"]
        assert "fp64 models can be compared" in said["fp64"]
        assert float(said["fp64_norm"]) <= 1e-6
        assert "layout.pp 1" in said["stage2"]
        assert "ascending stage id" in said["order"]
        assert "has [3]" in said["size"] and "'nothing' is unknown" in said["group"]
        assert "counted twice or not at all" in said["norm"]


def test_a_world_of_one_rank_steps_too() -> None:
    assert run_ranks(single_rank, 1) == [pytest.approx(5 * (1 - 0.25 * 2))]
