"""Sampling against its definition; decoding against a model whose answer is known."""

import pytest
import torch
from torch import Tensor

from moe_runtime.generate.decode import generate, stream
from moe_runtime.generate.sampling import draw, greedy, keep_top_p, probabilities, sample_token


def nucleus_oracle(probs: Tensor, top_p: float) -> Tensor:
    """Take tokens from the likeliest down until they hold top_p, one by one."""
    kept = torch.zeros_like(probs)
    held = 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-float(probs[i]), i)):
        kept[token] = probs[token]
        held += float(probs[token])
        if held >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        probs = torch.softmax(3 * torch.randn(50, generator=generator, dtype=torch.float64), dim=0)
        # 1e-12: the order of summation differs.
        torch.testing.assert_close(keep_top_p(probs, top_p), nucleus_oracle(probs, top_p), atol=1e-12, rtol=0)


def test_greedy_takes_the_likeliest_and_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]])
    assert greedy(logits).tolist() == [1, 0]
    assert sample_token(logits, 0.0, 0.9).tolist() == [1, 0]


def test_temperature_divides_logits() -> None:
    logits = torch.randn(2, 9, dtype=torch.bfloat16)
    expected = torch.softmax(logits.to(torch.float32) / 0.7, dim=-1)
    torch.testing.assert_close(probabilities(logits, 0.7), expected)
    assert probabilities(logits.double(), 0.7).dtype == torch.float64


def test_the_same_seed_draws_the_same_tokens_with_the_right_frequencies() -> None:
    probs = torch.tensor([0.5, 0.2, 0.3, 0.0]).expand(4000, 4)
    first = draw(probs, torch.Generator().manual_seed(5))
    assert torch.equal(first, draw(probs, torch.Generator().manual_seed(5)))
    shares = torch.bincount(first, minlength=4) / 4000
    # Standard deviation of a share is at most 0.008; 0.04 is five of them.
    assert float((shares - probs[0]).abs().max()) < 0.04 and shares[3] == 0


def test_a_single_row_of_logits_gives_a_scalar() -> None:
    assert sample_token(torch.tensor([0.0, 9.0]), 0.5, 0.9, torch.Generator().manual_seed(0)).shape == ()


def count_up(tokens: Tensor) -> Tensor:
    """Logits of a model that answers the last token plus one, modulo 10."""
    return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 50


def test_decoding_follows_the_model_until_the_limit() -> None:
    assert generate(count_up, [3], 5) == [4, 5, 6, 7, 8]
    assert generate(count_up, [3], 5, temperature=1.0, generator=torch.Generator().manual_seed(0)) == [
        4,
        5,
        6,
        7,
        8,
    ]


def test_a_stop_id_ends_decoding_and_is_not_given_out() -> None:
    assert generate(count_up, [3], 50, stop_ids={7}) == [4, 5, 6]


def test_the_model_sees_no_more_than_the_context_limit() -> None:
    seen: list[int] = []

    def model(tokens: Tensor) -> Tensor:
        seen.append(tokens.shape[1])
        return count_up(tokens)

    assert generate(model, [1, 2, 3], 4, context_limit=4) == [4, 5, 6, 7]
    assert seen == [3, 4, 4, 4]


def test_tokens_stream_one_by_one() -> None:
    tokens = stream(count_up, [0], 3)
    assert next(tokens) == 1 and list(tokens) == [2, 3]


def test_nothing_to_continue_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(count_up, [], 3)
