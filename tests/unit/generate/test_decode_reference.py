"""Decoding against a model whose answer is known."""

import pytest
import torch
from torch import Tensor

from moe_runtime.generate.decode_reference import generate, stream


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
