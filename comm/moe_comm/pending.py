"""Operations under way: what is left to do when they are waited for."""

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from moe_comm.errors import CommError, InputError

T = TypeVar("T")


def at_once(run: Callable[[], T]) -> "Started[T]":
    """An operation that takes place in the call; what it raises is raised by the wait."""
    try:
        value = run()
    except CommError as error:
        refusal = error.with_traceback(None)

        def fail() -> T:
            raise refusal

        return Started(fail)
    return Started(lambda: value)


class Started(Generic[T]):
    """A pending operation that `finish` brings to its end.

    `finish` closes over the buffers in flight; they are released when it has run, not before.

    Args:
        finish: blocks, then returns the result; called once.
        inputs: tensors of the caller that the operation reads until then.
    """

    def __init__(self, finish: Callable[[], T], inputs: Sequence[Tensor] = ()) -> None:
        self._finish: Callable[[], T] | None = finish
        # Weakly: who has let go of an input cannot change it.
        self._inputs = [(weakref.ref(x), x._version) for x in inputs if not x.is_inference()]

    def wait(self) -> T:
        """Block until done.

        Raises:
            CommError: it was waited for before.
            InputError: an input was changed in place since the call.
        """
        if self._finish is None:
            raise CommError("a pending operation was waited for twice; keep the result of the first wait")
        finish, self._finish = self._finish, None
        value = finish()
        for reference, version in self._inputs:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                raise InputError(
                    f"expected inputs that stay as they are until the wait, got one of shape "
                    f"{list(tensor.shape)} that was changed in place meanwhile; wait first, or pass a copy"
                )
        return value
