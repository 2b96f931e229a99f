"""From logits to the next token: primitives of a few lines each."""

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token: [..., vocab] -> int64 [...]; the lowest id wins a tie."""
    return logits.argmax(dim=-1)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits [..., vocab] divided by `temperature` > 0; at least FP32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(wide / temperature, dim=-1)


def keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds at least `top_p`, renormalised.

    Args:
        probs: [..., vocab], sums to 1.
        top_p: in (0, 1]; at least the likeliest token stays.
    """
    if top_p >= 1.0:
        return probs
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    ahead = ordered.cumsum(dim=-1) - ordered  # what the tokens before this one hold together
    kept = torch.where(ahead < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, ids, kept / kept.sum(dim=-1, keepdim=True))


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token from each row of probs [..., vocab] -> int64 [...]; same generator, same tokens."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """The next token.

    Args:
        logits: [vocab] or [rows, vocab].
        temperature: 0 is greedy.
        top_p: mass of the likeliest tokens to draw from, in (0, 1].
        generator: on the device of `logits`; None uses torch's own.

    Returns:
        int64 [] or [rows].
    """
    if temperature == 0.0:
        return greedy(logits)
    return draw(keep_top_p(probabilities(logits, temperature), top_p), generator)
