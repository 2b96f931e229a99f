"""Continues a sequence token by token, by a full forward each: no cache of keys and values here.

Simple and exactly what training computes, so it is the oracle for faster decoders; its cost grows with
the square of the length (times the length again within attention).
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from moe_runtime.generate.sampling import sample_token

Logits = Callable[[Tensor], Tensor]


@torch.no_grad()
def stream(
    model: Logits,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    context_limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """New tokens as they are made; a stop id ends it and is not given out.

    Args:
        model: int64 [1, sequence] -> logits [1, sequence, vocab].
        tokens: what to continue, at least one.
        max_new_tokens: at most so many.
        temperature: 0 is greedy.
        top_p: mass of the likeliest tokens to draw from, in (0, 1].
        stop_ids: such as the end of a document.
        generator: makes the draws repeatable.
        context_limit: the model sees only the last so many tokens; None: all of them.
        device: where the model lives.
    """
    if not tokens:
        raise ValueError("expected at least one token to continue, got none")
    seen = list(tokens)
    for _ in range(max_new_tokens):
        window = seen if context_limit is None else seen[-context_limit:]
        logits = model(torch.tensor([window], dtype=torch.int64, device=device))[:, -1]  # [1, vocab]
        token = int(sample_token(logits, temperature, top_p, generator))
        if token in stop_ids:
            return
        seen.append(token)
        yield token


def generate(
    model: Logits,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    context_limit: int | None = None,
    device: torch.device | str = "cpu",
) -> list[int]:
    """The new tokens of `stream`, all at once."""
    return list(
        stream(model, tokens, max_new_tokens, temperature, top_p, stop_ids, generator, context_limit, device)
    )
