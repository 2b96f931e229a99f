"""Holds a rank's state against what it was: bits that turn over in memory between two updates.

Weights, FP32 masters, moments and routing biases change once a step, in the update, and are only read in
between. So their digests are taken right after an update and compared right before the next: a difference is
a bit that nobody wrote, on this rank, in this tensor, within this step. That takes two passes over the state,
no memory to speak of (8 bytes a KiB) and no communication. Comparing replicas alone was rejected: weights are
written again from the masters at every update, so that a flipped weight spoils one gradient and is gone
before anyone compares; and masters and moments, cut over the ranks, have no replica.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.parallel.digest import WINDOW_BYTES, window_digests
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.parallel.zero_partition import FlatEntry

WEIGHTS, BIAS = "weights", "bias"


@dataclass(frozen=True)
class Held:
    """A tensor of a rank's state.

    Args:
        kind: `weights`, `master`, `bias`, or the optimizer's own name of a moment.
        group: of parameters; of a bias, its name.
        tensor: live.
        layout: which parameters lie in the flat group; empty for a bias.
        start: where in the flat group the tensor begins.
        numel: elements of the flat group that it covers: fewer codes or scales may stand for them.
        is_expert: held by ranks with the same experts only.
    """

    kind: str
    group: str
    tensor: Tensor
    layout: tuple[FlatEntry, ...] = ()
    start: int = 0
    numel: int = 0
    is_expert: bool = False

    def parameters_in(self, windows: list[int]) -> list[str]:
        """Canonical names of what lies in these windows of the tensor."""
        if not self.layout:
            return [self.group]
        each = WINDOW_BYTES * self.numel / max(1, self.tensor.nbytes)  # elements of the flat group a window
        spans = [(self.start + window * each, self.start + (window + 1) * each) for window in windows]
        found = [
            entry.name
            for entry in self.layout
            if any(entry.offset < end and begin < entry.offset + entry.numel for begin, end in spans)
        ]
        return found or [f"{self.group} (padding)"]


def held_state(runtime: Runtime, optimizer: ZeroOptimizer) -> Iterator[Held]:
    """Everything of this rank that only an update may change, in an order that replicas share."""
    for part, flat in zip(optimizer.partitions(), optimizer.flat_weights(), strict=True):
        yield Held(WEIGHTS, part.group, flat, part.layout, 0, flat.numel(), part.is_expert)
        native = optimizer.client.native_state(part.master)  # type: ignore[attr-defined]
        for kind, tensor in (("master", part.master.detach()), *sorted(native.items())):
            yield Held(kind, part.group, tensor, part.layout, part.start, part.master.numel(), part.is_expert)
    for chunk in runtime.chunks.values():
        for name, moe in chunk.moe_layers():
            yield Held(BIAS, f"{name}.moe.router.bias", moe.router.bias)


@dataclass(frozen=True)
class Change:
    """A tensor that is not what it was.

    Args:
        kind: as in `Held`.
        group: likewise.
        tensors: parameters in the KiB that changed.
        windows: which KiB of the tensor.
    """

    kind: str
    group: str
    tensors: list[str]
    windows: list[int]


class AtRest:
    """Digests of a rank's state.

    Args:
        runtime: has the routing biases.
        optimizer: has all the rest.
    """

    def __init__(self, runtime: Runtime, optimizer: ZeroOptimizer) -> None:
        self._runtime, self._optimizer = runtime, optimizer
        self._taken: dict[tuple[str, str], Tensor] = {}

    def take(self) -> None:
        """Take the digests of everything as it is now; `changes` compares with them."""
        self._taken = {(held.kind, held.group): window_digests(held.tensor) for held in self._held()}

    def changes(self) -> list[Change]:
        """What has changed since `take`; of this rank alone."""
        held = list(self._held())
        now = [window_digests(each.tensor) for each in held]
        return [
            self._describe(each, digests)
            for each, digests in zip(held, now, strict=True)
            if not torch.equal(digests, self._taken[each.kind, each.group])
        ]

    def _describe(self, held: Held, now: Tensor) -> Change:
        before = self._taken[held.kind, held.group]
        windows = (now != before).nonzero().flatten().tolist()
        return Change(held.kind, held.group, held.parameters_in(windows), windows)

    def _held(self) -> Iterator[Held]:
        return held_state(self._runtime, self._optimizer)
