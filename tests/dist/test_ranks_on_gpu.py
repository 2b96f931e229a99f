"""Several processes on one GPU, over gloo by way of host memory: the gradients of one process.

In FP64 against the plain model, so that nothing hides in rounding; and in BF16, with the kernels that
training runs, against one process that takes the same microbatches.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.dist.layout_case import Case, compare_gradients, held_gradients, relative
from tests.ranks import run_ranks_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda:0"
# Widths that grouped GEMMs and the Triton kernels take: rows of 16 bytes.
WIDE = {
    "hidden_size": 128,
    "ffn_size": 256,
    "num_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "expert_ffn_size": 64,
    "init_std": 0.05,
}


def _case(microbatches: int, precision: str = "fp64", **layout: object) -> Case:
    name = " ".join(f"{key} {value}" for key, value in layout.items()) + f" M {microbatches} {precision}"
    model = WIDE if precision == "bf16" else {}
    return Case(name, layout, microbatches, 1, precision=precision, model=model, device=DEVICE)


def _differences(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {case.name: compare_gradients(case, rank) for case in cases}


def _check_against_plain(world_size: int, cases: list[Case]) -> None:
    for rank, found in enumerate(run_ranks_on_gpu(_differences, world_size, cases)):
        for name, worst in found.items():
            bad = {what: number for what, number in worst.items() if not number <= 1e-10}
            assert not bad, f"{name}, rank {rank}: beyond 1e-10: {bad}"


def test_two_ranks_give_the_gradients_of_the_plain_model_under_every_schedule() -> None:
    names = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")
    cases = [_case(4, pp=2, schedule=name) for name in names]
    cases.append(_case(2, pp=1, dp=2, ep=2, dispatcher="alltoall"))
    _check_against_plain(2, cases)


def test_exchanges_that_fly_under_computation_give_the_gradients_of_the_plain_model() -> None:
    names = ("1f1b", "dualpipe", "dualpipev", "zbv")
    _check_against_plain(4, [_case(4, pp=2, dp=2, ep=2, schedule=name) for name in names])


def _gradients(
    rank: int, world_size: int, cases: list[Case]
) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    return {case.name: held_gradients(case, rank) for case in cases}


def test_two_ranks_in_bf16_give_the_gradients_of_one() -> None:
    layouts = [{"pp": 2, "schedule": name} for name in ("1f1b", "dualpipe", "dualpipev")]
    cases = [_case(4, "bf16", **layout) for layout in layouts]
    one = replace(cases[0], name="one", layout={"pp": 1})
    (alone,) = run_ranks_on_gpu(_gradients, 1, [one])
    norm, wanted = alone["one"]
    assert norm > 0
    for found in run_ranks_on_gpu(_gradients, 2, cases):
        for name, (own_norm, grads) in found.items():
            assert abs(own_norm - norm) <= 1e-5 * norm, f"{name}: norm {own_norm}, of one process {norm}"
            worst = {
                what: relative(torch.from_numpy(grad), torch.from_numpy(wanted[what]))
                for what, grad in grads.items()
            }
            # Sums in FP32 in another order; the phases themselves compute the same on either.
            bad = {what: number for what, number in worst.items() if not number <= 1e-4}
            assert not bad, f"{name}: beyond 1e-4 of the largest: {bad}"
