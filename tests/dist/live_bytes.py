"""A meter of live tensor memory: what a piece of code holds at its fullest moment, exact to the byte."""

import threading
import weakref
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Adds up the storages that operations read or write while it is active, each until it dies.

    Operations of this thread count, and of the threads that are started meanwhile. A storage that was
    there before counts from its first use on. Memory that a single operation takes and gives back
    inside is not seen.

    Args:
        ignored: tensors that do not count (parameters, their gradients).
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._alive: dict[int, weakref.ref] = {}
        # A storage may die, on the same thread, while another one is entered.
        self._lock = threading.RLock()

    def __enter__(self) -> "LiveBytes":
        run = threading.Thread.run

        def run_watched(thread: threading.Thread) -> None:
            with _Watch(self):
                run(thread)

        self._threads = patch.object(threading.Thread, "run", run_watched)
        self._watch = _Watch(self)
        self._threads.start()
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watch.__exit__(*exception)
        self._threads.stop()

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def died(_: weakref.ref) -> None:
            with self._lock:
                del self._alive[key]
                self.now -= size

        with self._lock:
            if key in self._alive or key in self._ignored:
                return
            self._alive[key] = weakref.ref(storage, died)
            self.now += size
            self.peak = max(self.peak, self.now)


class _Watch(TorchDispatchMode):
    """Shows one thread's operations to a meter."""

    def __init__(self, meter: LiveBytes) -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._meter.see(value)
        return result
