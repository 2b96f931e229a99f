"""No layout may change what is computed: every one of them against the plain model on one process."""

import pytest
import torch

from tests.dist.layout_case import Case, compare_gradients, compare_training, embedding_bytes, relative
from tests.ranks import run_ranks

# Expert 3 never chosen; experts 0 and 1 always chosen, so that all tokens go to the first EP rank.
IDLE, FLOOD = {3: -10.0}, {0: 10.0, 1: 10.0}

EP2 = ({"dp": 2, "ep": 2}, 3)
EP4 = ({"dp": 4, "ep": 4}, 2)
EP4_TWO_HOP = ({"dp": 4, "ep": 4, "dispatcher": "two_hop", "ranks_per_node": 2}, 2)
DP4_EP2 = ({"dp": 4, "ep": 2}, 1)
PP2_1F1B = ({"pp": 2, "schedule": "1f1b"}, 5)
PP2_DUALPIPE = ({"pp": 2, "schedule": "dualpipe"}, 6)
PP2_EP2_DUALPIPE = ({"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}, 4)
PP4_DUALPIPE_8 = ({"pp": 4, "schedule": "dualpipe"}, 8)
PP4_DUALPIPE_10 = ({"pp": 4, "schedule": "dualpipe"}, 10)
PP4_1F1B = ({"pp": 4, "schedule": "1f1b"}, 3)
PP4_EP2 = ({"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe"}, 8)
PP2_EP2_DP4 = ({"pp": 2, "dp": 4, "ep": 2, "schedule": "dualpipe"}, 4)

WORLDS = {
    2: {"ep2": EP2, "pp2 1f1b": PP2_1F1B, "pp2 dualpipe": PP2_DUALPIPE},
    4: {
        "ep4": EP4,
        "ep4 two_hop": EP4_TWO_HOP,
        "dp4 ep2": DP4_EP2,
        "pp2 ep2 dualpipe": PP2_EP2_DUALPIPE,
        "pp4 dualpipe M8": PP4_DUALPIPE_8,
        "pp4 dualpipe M10": PP4_DUALPIPE_10,
        "pp4 1f1b": PP4_1F1B,
    },
    8: {"pp4 ep2 dualpipe": PP4_EP2, "pp2 ep2 dp4 dualpipe": PP2_EP2_DP4},
}
ZERO_2 = {
    4: {
        "dp4 ep2 ZeRO 2": ({"dp": 4, "ep": 2, "zero_stage": 2}, 3),
        "dp4 ep2 ZeRO 2, W apart": ({"dp": 4, "ep": 2, "zero_stage": 2, "schedule": "zb1p"}, 3),
    }
}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}


def _variants(name: str, layout: dict, microbatches: int, precision: str) -> list[Case]:
    def case(label: str, **extra: object) -> Case:
        return Case(f"{name}, {label}, {precision}", layout, microbatches, precision=precision, **extra)

    return [
        case("plain"),
        case("MTP 1", mtp_depth=1),
        case("MTP 1, recompute", mtp_depth=1, recompute=True),
        case("MTP 1, idle expert", mtp_depth=1, biases=IDLE),
        case("all tokens to one rank", biases=FLOOD),
    ]


def _gradients(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {case.name: compare_gradients(case, rank) for case in cases}


def _training(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {case.name: compare_training(case, rank) for case in cases}


def _check(results: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    for rank, cases in enumerate(results):
        for name, worst in cases.items():
            bad = {what: number for what, number in worst.items() if not number <= tolerance}
            assert not bad, f"{name}, rank {rank}: beyond {tolerance}: {bad}"


# Eight ranks on two cores take as long as all the others together, and two see less than four: the slow tests.
SIZES = [pytest.param(size, marks=pytest.mark.slow if size in (2, 8) else ()) for size in WORLDS]


@pytest.mark.parametrize("precision", ["fp64", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", SIZES)
def test_gradients_do_not_depend_on_the_layout(world_size: int, precision: str) -> None:
    layouts = WORLDS[world_size].items()
    cases = [case for name, (layout, m) in layouts for case in _variants(name, layout, m, precision)]
    _check(run_ranks(_gradients, world_size, cases, timeout_s=300), TOLERANCE[precision])


@pytest.mark.parametrize("world_size", SIZES)
def test_three_zero_steps_do_not_depend_on_the_layout(world_size: int) -> None:
    layouts = WORLDS[world_size] | ZERO_2.get(world_size, {})
    cases = [Case(n, layout, m, mtp_depth=1, precision="fp32") for n, (layout, m) in layouts.items()]
    _check(run_ranks(_training, world_size, cases, timeout_s=300), 1e-6)


def test_gradients_do_not_depend_on_mtp_depth_or_microbatch_count() -> None:
    cases = [
        Case(f"MTP {depth}, M {microbatches}", {"pp": 2, "schedule": schedule}, microbatches, mtp_depth=depth)
        for schedule, counts in (("dualpipe", (4, 8)), ("1f1b", (1, 2, 7)))
        for depth in (0, 1, 2)
        for microbatches in counts
    ]
    _check(run_ranks(_gradients, 2, cases, timeout_s=300), 1e-10)


def test_a_model_without_latents_or_shared_expert_is_no_exception() -> None:
    bare = {"q_lora_rank": None, "num_shared_experts": 0, "num_dense_layers": 0}
    layout, microbatches = PP2_EP2_DUALPIPE
    models = {"bare": bare, "multi-head attention": {"attention": "mha"}}
    cases = [Case(name, layout, microbatches, mtp_depth=1, model=model) for name, model in models.items()]
    _check(run_ranks(_gradients, 4, cases), 1e-10)


# Targets of microbatches and lanes differ, down to none: means over them must be those of the global batch.
@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_masked_tokens_count_for_nothing_in_any_layout(world_size: int) -> None:
    cases = [
        Case(f"{name}, mask {mask}", layout, m, mtp_depth=depth, mask=mask)
        for name, (layout, m) in WORLDS[world_size].items()
        for mask, depth in (("ragged", 2), ("all", 1))
    ]
    _check(run_ranks(_gradients, world_size, cases, timeout_s=300), 1e-10)


def test_masked_tokens_count_for_nothing_under_dualpipe_with_experts_spread() -> None:
    layout, microbatches = PP2_EP2_DUALPIPE
    _check(
        run_ranks(_gradients, 4, [Case("ragged", layout, microbatches, mtp_depth=2, mask="ragged")]), 1e-10
    )


def test_a_document_mask_reaches_every_stage() -> None:
    layouts = {"dualpipe": ({"pp": 4, "schedule": "dualpipe"}, 8), "1f1b": ({"pp": 4, "schedule": "1f1b"}, 2)}
    cases = [Case(n, layout, m, mtp_depth=1, document_separator=5) for n, (layout, m) in layouts.items()]
    _check(run_ranks(_gradients, 4, cases), 1e-10)


def _embeddings(rank: int, world_size: int, case: Case) -> bytes | None:
    return embedding_bytes(case, rank)


# Over more than two lanes a sum depends on who is added first, and that on the bucket that a gradient is in.
@pytest.mark.parametrize(
    ("moments", "dp"), [("fp8", 2), ("bf16", 2), pytest.param("bf16", 4, marks=pytest.mark.slow)]
)
def test_both_copies_of_a_tied_embedding_stay_the_same_bits(moments: str, dp: int) -> None:
    layout = {"pp": 2, "dp": dp, "ep": dp, "schedule": "1f1b"}
    case = Case("tied", layout, 4, mtp_depth=1, precision="fp32", moments=moments)
    copies = run_ranks(_embeddings, 2 * dp, case)
    assert None not in copies and len(set(copies)) == 1


def test_relative_difference_sees_a_difference() -> None:
    assert relative(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])) == pytest.approx(0.1 / 2.1)
    assert relative(torch.tensor([1e-3]), torch.zeros(1)) == pytest.approx(1e-3)
