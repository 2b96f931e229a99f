"""Sees every tensor that a region of code makes: how large, of what dtype, and whether it still lives."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Records the outputs of all operations, also those inside autograd Functions and backward.

    Attributes:
        calls: how often each operation ran, by its name, such as `aten.mm`.
        largest: elements of the largest tensor made.
        dtypes: floating and complex dtypes of all tensors with at least one axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0
        self.dtypes: set[torch.dtype] = set()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[str(func).rpartition(".")[0]] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        if tensor.ndim and (tensor.is_floating_point() or tensor.is_complex()):
            self.dtypes.add(tensor.dtype)
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))

    def living_bytes(self, model: torch.nn.Module) -> int:
        """Bytes of what was made and is still held by anyone, without the model's own tensors."""
        gc.collect()
        own = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in model.state_dict().values()}
        living = (
            size
            for cdata, (reference, size) in self._storages.items()
            if cdata not in own and not reference.expired()
        )
        return sum(living)
