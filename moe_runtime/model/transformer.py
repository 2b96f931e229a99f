"""The stack: any slice of the model as a list of phases, and the whole of it under plain autograd.

A slice holds a range of layers, with the embedding, the head or both; names are those of the whole
model. `phases()` is what a pipeline stage runs; `losses()` runs the same list on one device, so there
is one model, not a parallel and a plain one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moe_comm import autograd as differentiable
from moe_comm.dispatcher import Dispatcher
from moe_comm.local import LocalDispatcher
from moe_comm.wire.carried import carry_over
from torch import Tensor, nn

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.block import Block
from moe_runtime.model.embedding import Embedding
from moe_runtime.model.init import init_parameters
from moe_runtime.model.linear import Linear
from moe_runtime.model.loss import head_loss
from moe_runtime.model.mla import document_mask
from moe_runtime.model.moe import MoE
from moe_runtime.model.mtp import MTP
from moe_runtime.model.norm import RMSNorm
from moe_runtime.model.phase import BALANCE, LOSS, LOSS_MTP, SCALARS, Combine, Compute, Dispatch, Phase
from moe_runtime.model.rope import Rotary
from moe_runtime.model.targets import token_ids

KEEP_ALL = RecomputeConfig()


@dataclass(frozen=True)
class Losses:
    """What one forward of the whole model gives.

    Args:
        loss: main cross-entropy, mean over tokens; one that is no target counts 0.
        loss_mtp: sum over depths of their mean cross-entropies, likewise; 0 without MTP.
        balance: sum over MoE layers, MTP's included, of the sequence-wise balance loss.
        counts: int64 [MoE layers, experts] tokens routed, in the order of `moe_layers()`.
    """

    loss: Tensor
    loss_mtp: Tensor
    balance: Tensor
    counts: Tensor


class Transformer(nn.Module):
    """A DeepSeek-V3-style model or a slice of it; parameters are empty until `init_weights`.

    Args:
        config: widths and counts of the whole model.
        layers: global numbers of the layers held here; None: all.
        has_embedding: holds the embedding; its phases begin with tokens.
        has_head: holds final norm, head and MTP modules; its phases end with losses.
        num_local_experts: routed experts of each layer held here; None: all.
        first_expert: global number of the first of them.
        recompute: what backward makes again.
        dtype: of parameters and activations; the routing bias is always FP32.
        document_separator: token that ends a document, if attention is to stay within documents; every
            slice then reads `tokens`.
        dispatcher: carries tokens to experts in `losses` and `forward`; None: all experts are here.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
        num_local_experts: int | None = None,
        first_expert: int = 0,
        recompute: RecomputeConfig = KEEP_ALL,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        document_separator: int | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config, self.has_embedding, self.has_head = config, has_embedding, has_head
        self.first_expert, self.document_separator = first_expert, document_separator
        self.dispatcher = LocalDispatcher(config.num_experts) if dispatcher is None else dispatcher
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        experts = config.num_experts if num_local_experts is None else num_local_experts
        rotary = Rotary(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        if has_embedding or self.needs_embedding_for_mtp:
            self.embed = Embedding(config.vocab_size, config.hidden_size, **kind)
        self.layers = nn.ModuleDict()
        for number in range(config.num_layers) if layers is None else layers:
            local = None if number < config.num_dense_layers else experts
            self.layers[str(number)] = Block(
                config, f"layers.{number}", rotary, recompute, local, first_expert, **kind
            )
        if has_head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **kind)
            self.head = Linear(config.hidden_size, config.vocab_size, **kind)
            self.mtp = nn.ModuleDict(
                {
                    str(depth): MTP(config, depth, rotary, recompute, experts, first_expert, **kind)
                    for depth in range(config.mtp_depth)
                }
            )

    @property
    def needs_embedding_for_mtp(self) -> bool:
        """True if MTP modules live here, which embed tokens whether or not the slice begins with them."""
        return self.has_head and self.config.mtp_depth > 0

    def init_weights(self, seed: int) -> None:
        """Fill all parameters; the same values whatever the slice. Ref: DSV3 §4.2."""
        init_parameters(self, self.config.init_std, seed, self.first_expert)

    def blocks(self) -> list[Block]:
        """Blocks in the order in which they run, those of MTP last."""
        modules = [*self.layers.values(), *(mtp.block for mtp in self._mtp())]
        return [block for block in modules if isinstance(block, Block)]

    def moe_layers(self) -> list[tuple[str, MoE]]:
        """Canonical prefix and module of every MoE layer here, in the order in which they run."""
        return [(block.name, block.moe) for block in self.blocks() if block.moe is not None]

    def phases(self) -> tuple[Phase, ...]:
        """The slice as phases, from `tokens` or `resid` to the losses or `resid`."""
        trunk = self._trunk(extra=1 + self.config.mtp_depth)
        return (*trunk, *self._loss_phases()) if self.has_head else trunk

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits [batch, seq, vocab] for int64 tokens [batch, seq]; MTP takes no part."""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The stream after the final norm, [batch, seq, hidden], for int64 tokens [batch, seq]."""
        state = {"tokens": tokens}
        self.run_phases((*self._trunk(extra=0), self._final_norm()), state)
        return state["hidden"]

    def losses(self, tokens: Tensor) -> Losses:
        """Losses of int64 tokens [batch, seq + 1 + mtp_depth], differentiable by plain autograd."""
        return self.run_phases(self.phases(), {"tokens": tokens})

    def _mtp(self) -> list[MTP]:
        return [mtp for mtp in self.mtp.values() if isinstance(mtp, MTP)] if self.has_head else []

    def _trunk(self, extra: int) -> tuple[Phase, ...]:
        """Everything before the final norm; the last `extra` columns of tokens are targets only."""
        phases: list[Phase] = []
        masked = self.document_separator is not None
        if masked:
            phases.append(self._mask_phase(extra))
        if self.has_embedding:

            def embed(tokens: Tensor) -> tuple[Tensor]:
                return (self.embed(token_ids(tokens[:, : tokens.shape[1] - extra])),)

            phases.append(Compute("embed", "embed", embed, ("tokens",), ("resid",)))
        routed = False
        for block in self.layers.values():
            assert isinstance(block, Block)
            phases.extend(block.phases(routed, masked))
            routed = block.is_moe
        if routed:
            phases.append(_merge(phases[-1].layer))
        return tuple(phases)

    def _mask_phase(self, extra: int) -> Compute:
        separator = self.document_separator
        assert separator is not None

        def mask(tokens: Tensor) -> tuple[Tensor]:
            return (document_mask(token_ids(tokens[:, : tokens.shape[1] - extra]), separator),)

        return Compute("mask", "embed", mask, ("tokens",), ("mask",))

    def _final_norm(self) -> Compute:
        return Compute("norm", "norm", lambda resid: (self.norm(resid),), ("resid",), ("hidden",))

    def _loss_phases(self) -> tuple[Phase, ...]:
        phases: list[Phase] = [self._final_norm(), self._loss(LOSS, "head", 1)]
        for mtp in self._mtp():
            phases.append(self._mtp_in(mtp))
            phases.extend(mtp.block.phases(False, self.document_separator is not None))
            phases.append(_merge(mtp.block.name))
            phases.append(Compute("norm", mtp.name, _norm_of(mtp), ("resid",), ("hidden",)))
            phases.append(self._loss(LOSS_MTP, mtp.name, 2 + mtp.depth))
        return tuple(phases)

    def _loss(self, slot: str, layer: str, shift: int) -> Compute:
        def loss(hidden: Tensor, tokens: Tensor) -> tuple[Tensor]:
            return (head_loss(hidden, self.head.weight, tokens[:, shift : shift + hidden.shape[1]]),)

        return Compute("loss", layer, loss, ("hidden", "tokens"), (slot,))

    def _mtp_in(self, mtp: MTP) -> Compute:
        first = 1 + mtp.depth

        def mtp_in(hidden: Tensor, tokens: Tensor) -> tuple[Tensor]:
            return (mtp.join(hidden, self.embed(token_ids(tokens[:, first : first + hidden.shape[1]]))),)

        return Compute("mtp_in", mtp.name, mtp_in, ("hidden", "tokens"), ("resid",))

    def run_phases(self, phases: tuple[Phase, ...], state: dict[str, Tensor]) -> Losses:
        """Run phases under plain autograd; `state` holds the input slots and receives the others."""
        totals = {slot: torch.zeros((), device=state["tokens"].device) for slot in SCALARS}
        counts: list[Tensor] = []
        handle: Any = None
        shape = torch.Size()
        for phase in phases:
            inputs = [state[slot] for slot in phase.inputs]
            if isinstance(phase, Dispatch):
                shape = inputs[0].shape
                tokens = carry_over(inputs[0], inputs[0].flatten(0, 1))
                received = differentiable.dispatch(self.dispatcher, tokens, *inputs[1:])
                outputs: tuple[Tensor, ...] = (received.rows, received.row_weights, received.row_counts)
                handle = received.handle
                counts.append(_count(inputs[2].flatten(), self.config.num_experts))
            elif isinstance(phase, Combine):
                routed = differentiable.combine(self.dispatcher, inputs[0], handle)
                outputs = (routed.view(shape),)
            else:
                outputs = phase.fn(*inputs)
            for slot, value in zip(phase.outputs, outputs, strict=True):
                if slot in totals:
                    totals[slot] = totals[slot] + value
                else:
                    state[slot] = value
        experts = self.config.num_experts
        stacked = torch.stack(counts) if counts else torch.zeros(0, experts, dtype=torch.int64)
        return Losses(totals[LOSS], totals[LOSS_MTP], totals[BALANCE], stacked)


def _count(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert is in expert_ids [choices]: int64 [num_experts]; without a wait."""
    counts = expert_ids.new_zeros(num_experts)
    return counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))


def _merge(layer: str) -> Compute:
    """Add the routed output of a chunk's last block."""
    return Compute("merge", layer, lambda resid, routed: (resid + routed,), ("resid", "routed"), ("resid",))


def _norm_of(mtp: MTP) -> Any:
    return lambda resid: (mtp.norm(resid),)
