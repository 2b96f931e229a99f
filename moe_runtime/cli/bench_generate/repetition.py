"""Whether a continuation has fallen into repetition, as greedy ones of small models do.

In a loop the same few contexts are met again and again, and acceptance is whatever it is in those: near 1 in
one loop, 1/3 in another. It says nothing about the model, so the share of continuations that loop belongs
beside it.
"""

from collections.abc import Sequence

LEAST_TOKENS = 64  # of the end that must repeat: bytes of a line or two, so that no honest text is counted
LEAST_COPIES = 3
LONGEST_PERIOD = 64


def period_of_end(
    tokens: Sequence[int],
    least_tokens: int = LEAST_TOKENS,
    least_copies: int = LEAST_COPIES,
    longest: int = LONGEST_PERIOD,
) -> int | None:
    """The smallest period of the end of `tokens`; None if it does not repeat.

    The end repeats with period p if its last max(least_tokens, least_copies p) tokens are each the one p
    before, the first p apart.

    Args:
        tokens: a continuation.
        longest: the longest period looked for.
    """
    tokens = list(tokens)
    for period in range(1, longest + 1):
        length = max(least_tokens, least_copies * period)
        if length > len(tokens):
            return None
        end = tokens[-length:]
        if end[period:] == end[:-period]:
            return period
    return None


def repeating_share(continuations: Sequence[Sequence[int]]) -> float:
    """Share of continuations whose end repeats; NaN of none."""
    if not continuations:
        return float("nan")
    return sum(period_of_end(tokens) is not None for tokens in continuations) / len(continuations)
