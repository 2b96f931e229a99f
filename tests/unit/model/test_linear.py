"""Linear and embedding: values and gradients against torch's own."""

import pytest
import torch
from torch import Tensor

from moe_runtime.model.embedding import Embedding
from moe_runtime.model.linear import Linear, linear
from moe_runtime.model.recompute import Recomputed
from tests.unit.model.samples import F64, draw


def filled_linear(dtype: torch.dtype = F64) -> Linear:
    layer = Linear(5, 7, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(draw(7, 5, seed=1))
    return layer


def test_linear_equals_torch_with_gradients() -> None:
    layer, x, pull = filled_linear(), draw(2, 3, 5, grad=True), draw(2, 3, 7, seed=2)
    out, wanted = layer(x), torch.nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-14)
    leaves = (x, layer.weight)
    pairs = zip(
        torch.autograd.grad(out, leaves, pull), torch.autograd.grad(wanted, leaves, pull), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_an_input_made_again_gives_the_same_gradients_and_is_asked_for_in_backward_only() -> None:
    layer, x, pull = filled_linear(), draw(4, 5, grad=True), draw(4, 7, seed=2)
    asked: list[int] = []
    value = x.detach()

    def make() -> Tensor:
        asked.append(1)
        return value

    wanted = torch.autograd.grad(layer(x), (x, layer.weight), pull)
    out = layer(x, Recomputed(make))
    assert not asked
    got = torch.autograd.grad(out, (x, layer.weight), pull)
    assert len(asked) == 1 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_higher_output_dtype_multiplies_in_it_and_gradients_return_in_their_own() -> None:
    weight, x = filled_linear(torch.bfloat16).weight, draw(4, 5, dtype=torch.bfloat16, grad=True)
    out = linear(x, weight, out_dtype=torch.float32)
    torch.testing.assert_close(out, x.to(torch.float32) @ weight.to(torch.float32).T, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert out.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_embedding_equals_torch_with_gradients_of_repeated_and_unused_tokens(dtype: torch.dtype) -> None:
    table = Embedding(9, 4, dtype=dtype)
    with torch.no_grad():
        table.weight.copy_(draw(9, 4))
    tokens = torch.tensor([[3, 3, 0], [8, 3, 0]])
    pull = draw(2, 3, 4, seed=1, dtype=dtype)
    out = table(tokens)
    assert torch.equal(out, table.weight[tokens])
    out.backward(pull)
    wanted = torch.zeros(9, 4, dtype=F64)
    for token, row in zip(tokens.flatten().tolist(), pull.flatten(0, 1), strict=True):
        wanted[token] += row
    torch.testing.assert_close(table.weight.grad, wanted.to(dtype), rtol=2e-7, atol=1e-7)
    assert table.weight.grad is not None and not table.weight.grad[[1, 2, 4, 5, 6, 7]].any()


@pytest.mark.usefixtures("nan_memory")
def test_unused_rows_of_an_embedding_get_zeros_whatever_memory_held() -> None:
    table = Embedding(4, 2)
    table(torch.tensor([2])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_embedding_gradients_of_bf16_are_summed_in_fp32() -> None:
    """1,024 times 2^-8: a BF16 sum would stop growing at 2."""
    table = Embedding(3, 2, dtype=torch.bfloat16)
    table(torch.ones(1024, dtype=torch.int64)).backward(torch.full((1024, 2), 2.0**-8, dtype=torch.bfloat16))
    assert table.weight.grad is not None and table.weight.grad[1].tolist() == [4.0, 4.0]
