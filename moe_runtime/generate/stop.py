"""Stop strings: where the first of them begins in a text, and what may still become one."""

from collections.abc import Sequence

from moe_runtime.errors import ConfigError


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
