"""Values that backward makes again instead of keeping. Ref: DSV3 §3.2.3.

A Function that would save an input may hold a `Recomputed` instead: a recipe from tensors that are
kept anyway (a norm's output from its input, say). Several users share one, so that the value is made
at the first request of a backward pass and dropped after the last.

Recompute of a whole region (torch.utils.checkpoint) was rejected: it would run attention again, whose
output and row sums are cheap to keep, and it would run GEMMs again whose outputs are kept here.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Recomputed(Generic[T]):
    """A value that is made again on request.

    Args:
        make: makes the value; runs without autograd. What it captures stays alive until backward.
        users: how many requests one backward pass makes; after the last the value is dropped.
    """

    def __init__(self, make: Callable[[], T], users: int = 1) -> None:
        self._make = make
        self._users = users
        self._left = users
        self._value: list[T] = []

    def take(self) -> T:
        """The value, made if it is not there; one of the `users` requests."""
        if not self._value:
            with torch.no_grad():
                self._value.append(self._make())
        value = self._value[0]
        self._left -= 1
        if self._left <= 0:
            self._value.clear()
            self._left = self._users
        return value
