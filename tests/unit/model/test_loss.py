"""The chunked cross-entropy equals torch's and never holds all logits."""

import pytest
import torch
from torch import Tensor

from moe_runtime.model.loss import head_loss
from tests.unit.model.samples import F64, draw
from tests.unit.model.watch import Watch

VOCAB, HIDDEN, CHUNK = 19, 6, 8


def case(tokens: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [tokens, HIDDEN] and head, which want gradients, and targets."""
    hidden = draw(tokens, HIDDEN, seed=tokens, dtype=dtype, grad=True)
    head = draw(VOCAB, HIDDEN, seed=1, dtype=dtype, grad=True)
    return hidden, head, torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_loss_and_gradients_equal_torch_for_sizes_around_the_chunk(tokens: int, keep: bool) -> None:
    hidden, head, targets = case(tokens)
    got = head_loss(hidden, head, targets, CHUNK, keep)
    wanted = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)
    mine = torch.autograd.grad(1.7 * got, (hidden, head))
    theirs = torch.autograd.grad(1.7 * wanted, (hidden, head))
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14)


def test_leading_axes_are_taken_together() -> None:
    hidden, head, targets = case(12)
    folded = head_loss(hidden.view(3, 4, HIDDEN), head, targets.view(3, 4), chunk=5)
    assert torch.equal(folded, head_loss(hidden, head, targets, chunk=5))


@pytest.mark.parametrize("keep", [False, True])
def test_backward_twice_gives_the_same_gradients(keep: bool) -> None:
    hidden, head, targets = case(11)
    loss = head_loss(hidden, head, targets, CHUNK, keep)
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_large_logits_do_not_overflow(keep: bool) -> None:
    hidden, head, targets = case(11, torch.float32)
    loss = head_loss(hidden * 1e4, head, targets, CHUNK, keep)
    loss.backward()
    assert torch.isfinite(loss)
    for leaf in (hidden, head):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("keep", [False, True])
def test_no_tensor_of_tokens_times_vocab_is_ever_made(keep: bool) -> None:
    tokens, vocab, width, chunk = 512, 96, 16, 32
    hidden, head = draw(tokens, width, grad=True), draw(vocab, width, grad=True)
    targets = torch.arange(tokens) % vocab
    with Watch() as watch:
        head_loss(hidden, head, targets, chunk, keep).backward()
    assert watch.largest <= max(chunk * vocab, tokens * width, vocab * width) < tokens * vocab


def test_bf16_losses_and_head_gradients_are_summed_in_fp32() -> None:
    hidden, head, targets = case(300, torch.bfloat16)
    loss = head_loss(hidden, head, targets, chunk=7)
    high = [x.detach().to(F64).requires_grad_() for x in (hidden, head)]
    exact = torch.nn.functional.cross_entropy(high[0] @ high[1].T, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=5e-3)
    loss.backward()
    wanted = torch.autograd.grad(exact, high[1])[0]
    assert head.grad is not None and head.grad.dtype == torch.bfloat16
    assert float((head.grad.to(F64) - wanted).norm() / wanted.norm()) < 8e-3


def test_nothing_is_made_for_backward_where_nobody_wants_gradients() -> None:
    hidden, head, targets = case(CHUNK)
    with torch.no_grad():
        quiet = head_loss(hidden, head, targets, CHUNK)
    assert not quiet.requires_grad
    assert torch.equal(quiet, head_loss(hidden, head, targets, CHUNK).detach())


@pytest.mark.parametrize("keep", [False, True])
def test_a_sink_receives_the_gradient_of_the_head_on_top_of_what_it_holds(keep: bool) -> None:
    hidden, head, targets = case(2 * CHUNK + 3)
    wanted = torch.autograd.grad(1.7 * head_loss(hidden, head, targets, CHUNK, keep), (hidden, head))
    buffer = torch.ones_like(head)
    head.grad_sink = lambda weight, accumulate, deferrable: accumulate(buffer)  # type: ignore[attr-defined]
    (1.7 * head_loss(hidden, head, targets, CHUNK, keep)).backward()
    assert head.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(buffer - 1, wanted[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_one_side_alone_may_want_a_gradient(frozen: str, keep: bool) -> None:
    hidden, head, targets = case(2 * CHUNK + 3)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    other = head if frozen == "hidden" else hidden
    got = torch.autograd.grad(head_loss(hidden, head, targets, CHUNK, keep), other)[0]
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ head.T, targets), other)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
