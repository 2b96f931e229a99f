"""Training in rounds: what a bound on rows changes is memory, not loss or gradients."""

import pytest
from torch import Tensor

from moe_runtime.parallel.executor import ActionFailed
from tests.dist.layout_case import Case, batch, build, compare_gradients, relative, run_lane
from tests.ranks import run_ranks

# Experts 0 and 1 always chosen: every row of every rank goes to the first expert-parallel rank.
FLOOD = {0: 10.0, 1: 10.0}
EP2 = {"dp": 2, "ep": 2}
EP4_TWO_HOP = {"dp": 4, "ep": 4, "dispatcher": "two_hop", "ranks_per_node": 2}
PP2_EP2_DUALPIPE = {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}
# Of 24 rows a rank sends in a layer: 7 is always too few, 26 only sometimes.
LAYOUTS = {
    1: [("local", {}, 2, 7)],
    2: [("ep2", EP2, 2, 7), ("ep2", EP2, 3, 26)],
    4: [
        ("ep4 two hops", EP4_TWO_HOP, 1, 7),
        ("pp2 ep2 dualpipe", PP2_EP2_DUALPIPE, 4, 7),
        ("pp2 ep2 dualpipe", PP2_EP2_DUALPIPE, 4, 26),
    ],
}


def _pairs(world_size: int, biases: dict[int, float]) -> list[tuple[Case, Case]]:
    """Each layout without a bound and in rounds."""
    pairs = []
    for name, layout, microbatches, max_rows in LAYOUTS[world_size]:
        rounds = layout | {"max_rows": max_rows, "overflow": "rounds"}
        name = f"{name}, at most {max_rows} rows"
        extra = {"biases": biases, "mtp_depth": 1, "precision": "fp64"}
        pairs.append((Case(name, layout, microbatches, **extra), Case(name, rounds, microbatches, **extra)))
    return pairs


def _gradients(case: Case, rank: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    runtime = build(case, rank)
    totals = run_lane(runtime, batch(runtime.config)).totals
    return {name: param.grad_accum for name, param in runtime.named_params}, totals


def _differences(rank: int, world_size: int, pairs: list[tuple[Case, Case]]) -> dict[str, dict[str, float]]:
    found = {}
    for plain, rounds in pairs:
        (expected, losses), (got, losses_got) = _gradients(plain, rank), _gradients(rounds, rank)
        worst = {name: relative(got[name], expected[name]) for name in expected}
        worst |= {name: abs(losses_got[name] - value) / abs(value) for name, value in losses.items()}
        found[plain.name] = {name: number for name, number in worst.items() if not number <= 1e-12}
    return found


def _check(world_size: int, biases: dict[int, float]) -> None:
    pairs = _pairs(world_size, biases)
    for rank, found in enumerate(run_ranks(_differences, world_size, pairs, timeout_s=300)):
        assert not any(found.values()), f"rank {rank}: {found}"


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_and_gradients_in_rounds_are_those_of_one_piece(world_size):
    _check(world_size, FLOOD)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_loss_and_gradients_do_not_depend_on_rounds_under_an_even_router(world_size):
    _check(world_size, {})


def _against_plain_model(rank: int, world_size: int, case: Case) -> dict[str, float]:
    return compare_gradients(case, rank)


@pytest.mark.slow
def test_rounds_agree_with_the_plain_model():
    _, case = _pairs(4, FLOOD)[-1]
    for worst in run_ranks(_against_plain_model, 4, case, timeout_s=300):
        assert max(worst.values()) <= 1e-10, worst


def _overflow(rank: int, world_size: int, case: Case) -> str:
    runtime = build(case, rank)
    try:
        run_lane(runtime, batch(runtime.config))
    except ActionFailed as error:
        return str(error)
    return "nothing was raised"


def test_without_rounds_too_many_rows_end_the_step_on_every_rank_with_one_message():
    case = Case("error", EP2 | {"max_rows": 30}, 1, biases=FLOOD, precision="fp64")
    first, second = run_ranks(_overflow, 2, case)
    assert first == second
    assert "ReceiveOverflow" in first and "max_rows 30" in first and "got 48" in first, first
