"""A MoE layer under plain autograd, in rounds where its rows do not fit; one process."""

import pickle

import pytest
import torch
from moe_comm import moe_layer
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import CommError, InputError
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from moe_comm.rounds import row_bytes
from torch import Tensor

TOKENS, HIDDEN, EXPERTS, TOP_K = 9, 4, 6, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Experts:
    """A matrix an expert, and a gain for all of them; counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        self.matrices = drawn.to(dtype).requires_grad_()
        self.gain = torch.ones(HIDDEN, dtype=dtype, requires_grad=True)
        self.calls = 0

    def __call__(self, rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> Tensor:
        self.calls += 1
        blocks = zip(rows.split(row_counts.tolist()), self.matrices, strict=True)
        outputs = torch.cat([torch.tanh(block @ matrix) for block, matrix in blocks])
        return outputs * self.gain * row_weights[:, None].to(rows.dtype)


def _open(max_rows: int | None) -> Dispatcher:
    return open_dispatcher("local", Placement(EXPERTS), max_rows=max_rows)


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices
    ids[2], ids[5, 1] = -1, -1
    return tokens.requires_grad_(), weights.requires_grad_(), ids


def _run(max_rows: int | None) -> tuple[list[Tensor], Experts]:
    experts, (tokens, weights, ids) = Experts(), _inputs()
    output = moe_layer(_open(max_rows), tokens, weights, ids, experts, [experts.matrices, experts.gain])
    output.square().sum().backward()
    return [output.detach(), tokens.grad, weights.grad, experts.matrices.grad, experts.gain.grad], experts


@pytest.mark.parametrize("max_rows", [1, 2, 5, 14, 15])
def test_rounds_give_what_one_piece_gives(max_rows):
    expected, _ = _run(None)
    got, experts = _run(max_rows)
    # 15 rows; the experts run once in one piece, and once a round and pass otherwise.
    assert experts.calls == (1 if max_rows >= 15 else 2 * -(-15 // max_rows))
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, **CLOSE)


def test_a_frozen_parameter_gets_no_gradient():
    experts, (tokens, weights, ids) = Experts(), _inputs()
    experts.gain.requires_grad_(False)
    moe_layer(_open(4), tokens, weights, ids, experts, [experts.gain, experts.matrices]).sum().backward()
    assert experts.gain.grad is None and experts.matrices.grad is not None


def test_gradients_of_a_parameter_are_not_left_in_grad_when_autograd_is_asked_for_them():
    experts, (tokens, weights, ids) = Experts(), _inputs()
    output = moe_layer(_open(4), tokens, weights, ids, experts, [experts.matrices, experts.gain])
    (found,) = torch.autograd.grad(output.sum(), [experts.matrices])
    assert experts.matrices.grad is None and experts.gain.grad is None
    assert bool(found.any())


def test_a_changed_input_is_noticed_before_the_backward_runs_on_it():
    experts, (tokens, weights, ids) = Experts(), _inputs()
    output = moe_layer(_open(4), tokens, weights, ids, experts, [experts.matrices])
    with torch.no_grad():
        tokens.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_sums_of_bf16_are_rounded_once_however_many_rounds_there_are():
    """The partial sums of a round are BF16, their sum is not: two roundings of 2**-9 at most."""
    outputs = []
    for dtype, max_rows in ((torch.float64, None), (torch.bfloat16, 1)):
        experts, (tokens, weights, ids) = Experts(dtype), _inputs(torch.bfloat16)
        listed = [experts.matrices, experts.gain]
        outputs.append(moe_layer(_open(max_rows), tokens.detach().to(dtype), weights, ids, experts, listed))
    exact, rounded = outputs
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact.double(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("max_rows", [None, 4])
def test_a_parameter_that_is_not_listed_is_refused_whether_rows_fit_or_not(max_rows):
    experts, (tokens, weights, ids) = Experts(), _inputs()
    with pytest.raises(InputError, match=r"another one of shape \[4\]"):
        moe_layer(_open(max_rows), tokens, weights, ids, experts, [experts.matrices]).sum().backward()


def test_what_lies_behind_a_listed_tensor_is_not_the_experts():
    experts, (tokens, weights, ids) = Experts(), _inputs()
    leaf = experts.matrices
    experts.matrices = leaf * 2
    for max_rows in (None, 4):
        output = moe_layer(_open(max_rows), tokens, weights, ids, experts, [experts.matrices, experts.gain])
        output.sum().backward(retain_graph=True)
    assert leaf.grad is not None


@pytest.mark.parametrize("max_rows", [None, 4])
def test_experts_run_again_under_the_autocast_of_their_forward(max_rows):
    experts, (tokens, weights, ids) = Experts(torch.float32), _inputs(torch.float32)
    seen = []

    def watched(*rows: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return experts(*rows).to(rows[0].dtype)

    listed = [experts.matrices, experts.gain]
    with torch.autocast("cpu", torch.float16):
        output = moe_layer(_open(max_rows), tokens, weights, ids, watched, listed)
    output.sum().backward()
    assert set(seen) == {(True, torch.float16)}


@pytest.mark.parametrize("max_rows", [None, 4])
def test_experts_without_rows_need_no_graph(max_rows):
    experts, (tokens, weights, ids) = Experts(), _inputs()
    listed = [experts.matrices, experts.gain]

    def none(rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> Tensor:
        return experts(rows, row_weights, row_counts) if len(rows) else rows.new_zeros(rows.shape)

    output = moe_layer(_open(max_rows), tokens, weights, torch.full_like(ids, -1), none, listed)
    output.sum().backward()
    assert tokens.grad is not None and not tokens.grad.any()


def test_experts_that_give_no_tensor_are_refused():
    _, (tokens, weights, ids) = Experts(), _inputs()
    with pytest.raises(InputError, match="expected a tensor of experts, got NoneType"):
        moe_layer(_open(None), tokens, weights, ids, lambda *_: None, [])


def test_a_layer_cannot_be_pickled_and_says_what_to_do():
    with pytest.raises(CommError, match="state_dict"):
        pickle.dumps({"dispatcher": _open(None)})


def test_without_autograd_nothing_is_recorded():
    experts, (tokens, weights, ids) = Experts(), _inputs()
    with torch.no_grad():
        output = moe_layer(_open(4), tokens, weights, ids, experts, [experts.matrices])
    assert not output.requires_grad and experts.calls == 4


def test_bytes_of_a_row_are_those_of_its_fullest_moment():
    # 7168 + 3 x 2048 values and 2 x 7168 + 3 x 2048 gradients, 2 bytes each.
    assert row_bytes(7168, 2048, torch.bfloat16) == 2 * (13312 + 20480)
    assert row_bytes(100, 50, torch.bfloat16, torch.float32) == 2 * 250 + 4 * 350
    assert row_bytes(600, 100, torch.float32) == 4 * 2400 == row_bytes(600, 1, torch.float32)
    assert row_bytes(600, 1, torch.bfloat16, wire="fp32") == 2 * 1200 + 4 * 1200
    assert row_bytes(600, 1, torch.bfloat16, wire="fp8") == 2 * 2400, "what is sent back is BF16"
