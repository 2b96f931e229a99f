import pytest
import torch
from moe_comm import autograd
from moe_comm.errors import CountMismatch, ReceiveOverflow
from moe_comm.local import LocalDispatcher
from moe_comm.reference import reference_combine, reference_dispatch, reference_layer, reference_rows
from moe_comm.traffic import Traffic

from tests.unit.comm.routings import PATTERNS, draw

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_four_operations_equal_the_slow_oracle(pattern, dtype):
    drawn = draw(pattern, 1, dtype=dtype, weight_dtype=torch.float32)
    origins = reference_rows(drawn.expert_ids, drawn.num_experts)
    dispatcher = LocalDispatcher(drawn.num_experts)
    received = dispatcher.dispatch(drawn.tokens[0], drawn.weights[0], drawn.expert_ids[0]).wait()
    rows, row_weights = reference_dispatch(drawn.tokens, drawn.weights, origins)[0]
    assert torch.equal(received.rows, rows)
    assert torch.equal(received.row_weights, row_weights)
    assert received.row_counts.tolist() == [
        sum(r.expert == e for r in origins[0]) for e in range(drawn.num_experts)
    ]
    num_tokens, top_k = drawn.expert_ids[0].shape
    summed = reference_combine([rows], origins, [num_tokens], top_k)[0]
    # The loops round BF16's exact ties to even, sums on a CPU away from zero: one unit in the last place.
    tolerance = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(dispatcher.combine(rows, received.handle).wait(), summed, **tolerance)
    d_rows = dispatcher.combine_backward(drawn.tokens[0], received.handle).wait()
    assert torch.equal(d_rows, rows)
    d_tokens, d_weights = dispatcher.dispatch_backward(rows, row_weights, received.handle).wait()
    torch.testing.assert_close(d_tokens, summed, **tolerance)
    assert torch.equal(d_weights, drawn.weights[0].masked_fill(drawn.expert_ids[0] < 0, 0.0))


@pytest.mark.parametrize("pattern", ["random", "masked"])
def test_a_layer_equals_the_plain_loop_with_its_gradients(pattern):
    drawn = draw(pattern, 1, dtype=torch.float64, weight_dtype=torch.float64)
    matrices = torch.randn(drawn.num_experts, 5, 5, dtype=torch.float64)
    results = []
    for fast in (True, False):
        tokens = drawn.tokens[0].clone().requires_grad_()
        weights = drawn.weights[0].clone().requires_grad_()
        experts = [matrix.clone().requires_grad_() for matrix in matrices]
        if fast:
            dispatcher = LocalDispatcher(drawn.num_experts)
            received = autograd.dispatch(dispatcher, tokens, weights, drawn.expert_ids[0])
            blocks = received.rows.split(received.row_counts.tolist())
            out = torch.cat([block @ matrix for block, matrix in zip(blocks, experts, strict=True)])
            out = autograd.combine(dispatcher, out * received.row_weights[:, None], received.handle)
        else:
            functions = [lambda x, matrix=matrix: x @ matrix for matrix in experts]
            out = reference_layer([tokens], [weights], drawn.expert_ids, functions)[0]
        out.square().sum().backward()
        results.append((out, tokens.grad, weights.grad, *(matrix.grad for matrix in experts)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_dispatch_and_combine_pass_gradcheck():
    drawn = draw("random", 1, dtype=torch.float64, weight_dtype=torch.float64, hidden=2)
    dispatcher = LocalDispatcher(drawn.num_experts)

    def layer(tokens, weights):
        received = autograd.dispatch(dispatcher, tokens, weights, drawn.expert_ids[0])
        return autograd.combine(
            dispatcher, received.rows.sin() * received.row_weights[:, None], received.handle
        )

    inputs = (drawn.tokens[0].requires_grad_(), drawn.weights[0].requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs)


def test_a_handle_serves_two_combines_and_a_second_backward():
    drawn = draw("random", 1, dtype=torch.float64, weight_dtype=torch.float64)
    dispatcher = LocalDispatcher(drawn.num_experts)
    tokens = drawn.tokens[0].requires_grad_()
    received = autograd.dispatch(dispatcher, tokens, drawn.weights[0], drawn.expert_ids[0])
    first = autograd.combine(dispatcher, received.rows, received.handle)
    second = autograd.combine(dispatcher, received.rows * 2, received.handle)
    torch.testing.assert_close(second, first * 2)
    (first + second).sum().backward(retain_graph=True)
    once = tokens.grad.clone()
    (first + second).sum().backward()
    torch.testing.assert_close(tokens.grad, once * 2)


def test_unused_row_weights_leave_a_zero_gradient():
    drawn = draw("random", 1, dtype=torch.float64, weight_dtype=torch.float64)
    weights = drawn.weights[0].requires_grad_()
    dispatcher = LocalDispatcher(drawn.num_experts)
    received = autograd.dispatch(dispatcher, drawn.tokens[0].requires_grad_(), weights, drawn.expert_ids[0])
    received.rows.sum().backward()
    assert torch.equal(weights.grad, torch.zeros_like(weights))


def test_rows_of_another_shape_are_refused():
    drawn = draw("random", 1, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = LocalDispatcher(drawn.num_experts)
    received = dispatcher.dispatch(drawn.tokens[0], drawn.weights[0], drawn.expert_ids[0]).wait()
    handle = received.handle
    with pytest.raises(CountMismatch, match=r"combine: expected rows \[21, 5\] as dispatched, got \[20, 5\]"):
        dispatcher.combine(received.rows[1:], handle).wait()
    with pytest.raises(CountMismatch, match="21 row weights"):
        dispatcher.dispatch_backward(received.rows, received.row_weights[1:], handle).wait()
    with pytest.raises(CountMismatch, match=r"gradients \[7, 5\]"):
        dispatcher.combine_backward(drawn.tokens[0][:, 1:], handle).wait()


def test_more_rows_than_max_rows_are_refused_with_the_table_and_as_many_are_not():
    drawn = draw("random", 1, dtype=torch.float32, weight_dtype=torch.float32)
    LocalDispatcher(drawn.num_experts, max_rows=21).dispatch(*drawn.of(0)).wait()
    bounded = LocalDispatcher(drawn.num_experts, max_rows=20)
    with pytest.raises(ReceiveOverflow, match="at most max_rows 20 rows on a rank, got 21 ") as raised:
        bounded.dispatch(*drawn.of(0)).wait()
    assert raised.value.rows_sent.tolist() == [[21]]
    masked = draw("masked", 1, dtype=torch.float32, weight_dtype=torch.float32)
    assert bounded.dispatch(*masked.of(0)).wait().rows.shape[0] <= 20


def test_nothing_leaves_the_rank():
    drawn = draw("random", 1, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = LocalDispatcher(drawn.num_experts)
    received = dispatcher.dispatch(*drawn.of(0)).wait()
    dispatcher.combine(received.rows, received.handle)
    dispatcher.combine_backward(drawn.tokens[0], received.handle)
    dispatcher.dispatch_backward(received.rows, received.row_weights, received.handle)
    assert dispatcher.traffic.snapshot(reset=True) == Traffic(rows_self=4 * 21)
    assert dispatcher.traffic.snapshot() == Traffic()
