"""Operations under way: what is left to do when they are waited for."""

from collections.abc import Callable
from typing import Generic, TypeVar

from moe_comm.errors import CommError

T = TypeVar("T")


class Done(Generic[T]):
    """A pending operation that needed no waiting.

    Args:
        value: its result.
    """

    def __init__(self, value: T) -> None:
        self._value: T = value

    def wait(self) -> T:
        """The result."""
        return self._value


class Started(Generic[T]):
    """A pending operation that `finish` brings to its end.

    `finish` closes over the buffers in flight; they are released when it has run, not before.

    Args:
        finish: blocks, then returns the result; called once.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """Block until done.

        Raises:
            CommError: it was waited for before.
        """
        if self._finish is None:
            raise CommError("a pending operation was waited for twice; keep the result of the first wait")
        finish, self._finish = self._finish, None
        return finish()
