"""When a sequence ends other than by a stop token: at a stop string, or when its context is full."""

from collections.abc import Sequence

from moe_runtime.errors import ConfigError


def token_limit(max_tokens: int, prompt_tokens: int, context_length: int | None) -> int:
    """New tokens that a prompt may be given: at most `max_tokens`, and no more than the context holds.

    Args:
        context_length: tokens of the prompt and new ones together; None: no limit.

    Raises:
        ConfigError: not one fits.
    """
    if max_tokens < 1:
        raise ConfigError(f"max tokens: expected at least 1, got {max_tokens}")
    if context_length is None:
        return max_tokens
    if prompt_tokens >= context_length:
        raise ConfigError(
            f"prompt: expected at most {context_length - 1} tokens, one less than the context, got "
            f"{prompt_tokens}; shorten it"
        )
    return min(max_tokens, context_length - prompt_tokens)


def check_stops(stops: Sequence[str]) -> None:
    """Refuse a stop string that would stop everything.

    Raises:
        ConfigError: one is empty.
    """
    if "" in stops:
        raise ConfigError("stop: expected strings of at least one character, got an empty one")


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first in `text`, the longest of those; None if there is none."""
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def possible_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with and goes on after."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(len(stop) > length and stop.startswith(tail) for stop in stops):
            return length
    return 0
