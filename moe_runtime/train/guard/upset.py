"""Faults of a run that no single number shows: what the injector does to routing, casts and data.

    dead_expert     an expert's routing bias falls 0.9 below its layer's mean: no token chooses it any more
    overload        it rises 0.9 above: every token does
    bias_runaway    it rises by 0.1 in each of several steps, whatever the load says
    saturate        from now on a rank casts weights with scales an eighth of what they should be
    noise           a rank reads random tokens in place of a step's data

Nothing is pretended: tokens really go elsewhere, codes are really cut off, and what the run measures, tells
and does is left to it. Biases are alike on all ranks that hold a layer, so every rank takes part in a fault
of them, else the replicas would differ, and that is another fault, which is found and mended as such. For the
same reason the guard over state at rest is told that biases were written.

The expert is the first one that the fault's rank holds, in the first MoE layer of the model.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moe_runtime.config.counts import moe_layers
from moe_runtime.data.vocabulary import Ids
from moe_runtime.fp8.cast import decode
from moe_runtime.fp8.tiled import TILE, Blocks
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.train.fault import Fault
from moe_runtime.train.guard.integrity import Integrity

_FAR, _STEP = 0.9, 0.1  # affinities lie between 0 and 1
_TOO_SMALL = 8.0
_LARGEST = 448.0


class Loader(Protocol):
    """What gives a rank its tokens."""

    def rows(self, numbers: Ids) -> Tensor: ...


def upset_bias(fault: Fault, runtime: Runtime, integrity: Integrity) -> None:
    """Move the bias of one expert; every rank of the run calls this."""
    mesh, model = runtime.mesh, runtime.config.model
    expert = fault.rank % mesh.dp % mesh.ep * (model.num_experts // mesh.ep)
    first = moe_layers(model)[0]
    for chunk in runtime.chunks.values():
        for layer, moe in chunk.moe_layers():
            if layer == first:
                _move(moe.router.bias, expert, fault.kind)
    integrity.take()


@torch.no_grad()
def _move(bias: Tensor, expert: int, kind: str) -> None:
    if kind == "bias_runaway":
        bias[expert] += _STEP
    else:
        bias[expert] = bias.mean() + (_FAR if kind == "overload" else -_FAR)


def upset_casts(runtime: Runtime) -> None:
    """Let this rank cast weights with scales that are too small, from now on."""
    casts = runtime.weight_casts
    whole = casts.cast
    casts.cast = lambda weight: _cut_both(whole(weight))
    casts.drop()


def _cut_both(both: tuple[Blocks, Blocks]) -> tuple[Blocks, Blocks]:
    return _cut(both[0]), _cut(both[1])


def _cut(blocks: Blocks) -> Blocks:
    scales = blocks.scales / _TOO_SMALL
    rows, columns = blocks.shape[-2:]
    spread = scales.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :columns]
    wanted = (decode(blocks) / spread).clamp(-_LARGEST, _LARGEST)
    return Blocks(wanted.to(torch.float8_e4m3fn).view(torch.uint8), scales)


def upset_tokens(loader: Loader, vocab_size: int, seed: int) -> None:
    """Let the loader give random tokens the next time it is asked, and the right ones after that."""
    read: Callable[[Ids], Tensor] = loader.rows

    def noise(numbers: Ids) -> Tensor:
        loader.rows = read  # type: ignore[method-assign, assignment]
        right, chance = read(numbers), torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, right.shape, generator=chance)

    loader.rows = noise  # type: ignore[method-assign, assignment]
