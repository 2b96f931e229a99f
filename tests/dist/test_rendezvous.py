"""The pipeline on a transport without tags whose sends wait for their receives; deferral of W."""

from dataclasses import replace

import pytest
import torch

from moe_runtime.parallel.executor import ActionFailed
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.passes import merge_weight_grads
from tests.dist.layout_case import MTP_LAMBDA, Case, batch, relative
from tests.dist.plain_model import PlainModel
from tests.dist.rendezvous import run_pipeline

CASES = [
    Case("1f1b", {"pp": 4, "schedule": "1f1b"}, 6, mtp_depth=1),
    Case("dualpipe", {"pp": 4, "schedule": "dualpipe"}, 8, mtp_depth=1),
    Case("dualpipe of two", {"pp": 2, "schedule": "dualpipe"}, 4, mtp_depth=1, recompute=True),
]


def _summed(runtimes: list) -> dict[str, torch.Tensor]:
    """Gradients summed over the ranks that hold the parameter (mirrored rows, tied copies), by name."""
    sums: dict[str, torch.Tensor] = {}
    for runtime in runtimes:
        for name, param in runtime.named_params:
            sums[name] = sums[name] + param.grad_accum if name in sums else param.grad_accum.clone()
    return sums


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_right_when_sends_wait_for_receives_and_tags_do_not_exist(case: Case) -> None:
    runtimes, _ = run_pipeline(case)
    plain = PlainModel(case.config(), case.biases).forward_backward(batch(case.config()), MTP_LAMBDA)
    directions = 2 if runtimes[0].mesh.is_mirrored else 1
    for name, grad in _summed(runtimes).items():
        assert relative(grad / directions, plain.grads[name]) <= 1e-10, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_deferred_weight_gradients_are_the_same_bits(case: Case, precision: str) -> None:
    case = Case(case.name, case.layout, case.microbatches, mtp_depth=1, precision=precision)
    deferred, _ = run_pipeline(case)
    at_once, _ = run_pipeline(case, merge_weight_grads)
    for one, other in zip(deferred, at_once, strict=True):
        for (name, a), (_, b) in zip(one.named_params, other.named_params, strict=True):
            assert torch.equal(a.grad_accum, b.grad_accum), name
            assert a.grad_accum.dtype == torch.float32 and a.grad_accum.abs().max() > 0, name


def test_an_exception_in_an_action_names_rank_position_and_action() -> None:
    def spoil(program: Program) -> Program:
        too_early = next(entry for entry in program.rows[0] if str(entry) == "0B1")
        return replace(program, rows=((too_early, *program.rows[0]),))

    with pytest.raises(ActionFailed, match=r"pipeline rank 0, position 0, 0B1: KeyError"):
        run_pipeline(Case("spoiled", {"pp": 1}, 2), spoil)
