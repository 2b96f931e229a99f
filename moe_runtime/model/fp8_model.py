"""Puts the policy into a built model: which layer multiplies with what. Ref: DSV3 §3.3.1.

A layer never asks whether it is FP8. It holds what multiplies, and here that is replaced, layer by layer, as
the table of `fp8/policy.py` says. Norms whose output an FP8 product reads cast it as they make it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_runtime.fp8 import cast
from moe_runtime.fp8.e5m6 import Packed, pack_e5m6, unpack_e5m6
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.watch import Fp8Watch
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.block import Block
from moe_runtime.model.fp8_gated import Fp8Experts, Fp8FeedForward
from moe_runtime.model.fp8_linear import Fp8Multiplier
from moe_runtime.model.fp8_operands import Casts, Kit, flat, hang
from moe_runtime.model.linear import Linear
from moe_runtime.model.mla import MLA
from moe_runtime.model.norm import Normalise
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.transformer import Transformer


def use_fp8(
    model: Transformer,
    policy: Policy,
    weights: WeightCasts,
    casts: Casts = cast,
    watch: Fp8Watch | None = None,
) -> list[str]:
    """Let a model, or a slice of one, multiply in FP8 where the policy says so.

    Args:
        weights: keeps the casts of weights; whoever changes weights drops them.
        casts: makes tiles.
        watch: counts what casts do, in steps that are sampled; None: nobody asks.

    Returns:
        Canonical names of the modules that are FP8 now.
    """
    watch = Fp8Watch() if watch is None else watch
    return [name for block in model.blocks() for name in _use_in_block(block, policy, weights, casts, watch)]


def _use_in_block(
    block: Block, policy: Policy, weights: WeightCasts, casts: Casts, watch: Fp8Watch
) -> list[str]:
    def kit_of(part: str) -> Kit | None:
        choice = policy.of(f"{block.name}.{part}")
        return None if choice is None else Kit(choice, weights, casts, watch)

    found = {part: kit for part in _parts(block) if (kit := kit_of(part)) is not None}
    for part, kit in found.items():
        _use(block, part, kit)
    _cast_norms(block, {part for part, kit in found.items() if kit.choice.fprop}, casts)
    return [f"{block.name}.{part}" for part in found]


def _mla(block: Block) -> MLA:
    assert isinstance(block.attn, MLA), "the rules of a config refuse FP8 for other attention"
    return block.attn


def _linears(attn: MLA) -> dict[str, Linear]:
    return {name: module for name, module in attn.named_children() if isinstance(module, Linear)}


def _parts(block: Block) -> list[str]:
    """Names of what can be FP8 in a block."""
    parts = [f"attn.{name}" for name in _linears(_mla(block))]
    if block.ffn is not None:
        parts.append("ffn")
    if block.moe is not None:
        parts += ["moe.experts"] if block.moe.shared is None else ["moe.shared", "moe.experts"]
    return parts


def _use(block: Block, part: str, kit: Kit) -> None:
    if part.startswith("attn."):
        _linears(_mla(block))[part.removeprefix("attn.")].multiplier = Fp8Multiplier(kit)
        if kit.choice.keeps_e5m6:
            _mla(block).share_output = _in_e5m6
    elif part == "ffn" and block.ffn is not None:
        block.ffn.compute = Fp8FeedForward(kit)
    elif block.moe is not None and part == "moe.experts":
        block.moe.experts.compute = Fp8Experts(kit)
    elif block.moe is not None and block.moe.shared is not None:
        block.moe.shared.compute = Fp8FeedForward(kit)


def _in_e5m6(x: Tensor) -> tuple[Recomputed[Packed], Callable[[], Tensor]]:
    """x [..., k] kept in E5M6: a source of that for the weight gradient, and the values again."""
    packed, dtype = pack_e5m6(flat(x)), x.dtype
    return Recomputed(lambda: packed), lambda: unpack_e5m6(packed, dtype)


def _cast_norms(block: Block, fp8: set[str], casts: Casts) -> None:
    """Let the norms that are read by an FP8 product cast their output."""
    attn, normalise = _mla(block), normalise_with(casts)
    first = {"attn.q", "attn.q_a", "attn.kv_a"}
    readers = {
        block.attn_norm: first,
        attn.kv_a_norm: {"attn.kv_b"},
        block.ffn_norm: {"ffn", "moe.shared", "moe.experts"},
    }
    if attn.config.q_lora_rank is not None:
        readers[attn.q_a_norm] = {"attn.q_b"}
    for norm, parts in readers.items():
        if parts & fp8:
            norm.normalise = normalise


def normalise_with(casts: Casts) -> Normalise:
    """A norm whose output carries its tiles."""

    def normalise_and_cast(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, rstd, tiles = casts.cast_normed(flat(x), gain, eps)
        return hang(out.view(x.shape), tiles), rstd.view(*x.shape[:-1], 1)

    return torch.no_grad()(normalise_and_cast)
