"""One transformer block as phases.

    dense    dense: attention and FFN, both residuals
    MoE      attend | dispatch | shared | experts | combine

`attend` goes from the residual stream to the choice of experts. The routed output of a block is added
to the stream by the next block's `attend` (or by `merge` at the end of a chunk), so that nothing waits
for combine before it must; `shared` depends on no message and fills the time of dispatch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.model.mha import MHA
from moe_runtime.model.mla import MLA
from moe_runtime.model.moe import MoE
from moe_runtime.model.norm import RMSNorm
from moe_runtime.model.phase import BALANCE, Combine, Compute, Dispatch, Phase
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.rope import Rotary


class Block(nn.Module):
    """Attention and a dense or MoE FFN, pre-norm.

    Args:
        config: widths and counts.
        name: canonical prefix, such as `layers.3`.
        num_local_experts: routed experts held here; None: a dense block.
        first_expert: global number of the first of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        rotary: Rotary,
        recompute: RecomputeConfig,
        num_local_experts: int | None,
        first_expert: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.name, self.recompute = name, recompute
        self.attn_norm = RMSNorm(hidden, eps, **kind)
        self.attn: MLA | MHA = (
            MHA(config, rotary, **kind)
            if config.attention == "mha"
            else MLA(config, rotary, recompute, **kind)
        )
        self.ffn_norm = RMSNorm(hidden, eps, **kind)
        self.ffn: SwiGLU | None = None
        self.moe: MoE | None = None
        if num_local_experts is None:
            self.ffn = SwiGLU(hidden, config.ffn_size, recompute.swiglu, **kind)
        else:
            self.moe = MoE(config, recompute, num_local_experts, first_expert, **kind)

    @property
    def is_moe(self) -> bool:
        """True if this block routes."""
        return self.moe is not None

    def phases(self, reads_routed: bool, reads_mask: bool) -> tuple[Phase, ...]:
        """The block's phases in forward order.

        Args:
            reads_routed: the block before left its routed output to be added.
            reads_mask: attention reads slot `mask`.
        """
        before = ("resid", *(("routed",) if reads_routed else ()), *(("mask",) if reads_mask else ()))
        if self.moe is None:
            return (Compute("dense", self.name, self._phase(reads_routed, self._dense), before, ("resid",)),)
        outputs = ("resid", "ffn_in", "gate_weights", "expert_ids", BALANCE)
        phases: list[Phase] = [
            Compute("attend", self.name, self._phase(reads_routed, self._attend), before, outputs),
            Dispatch(self.name),
        ]
        if self.moe.shared is not None:
            phases.append(Compute("shared", self.name, self._shared, ("resid", "ffn_in"), ("resid",)))
        rows = ("rows", "row_weights", "row_counts")
        phases.append(Compute("experts", self.name, self._experts, rows, ("expert_out",)))
        return (*phases, Combine(self.name))

    def _phase(self, reads_routed: bool, body: Any) -> Any:
        """`body(resid, mask)` as a function of the slots that the phase reads."""

        def with_routed(resid: Tensor, routed: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
            return body(resid + routed, mask)

        return with_routed if reads_routed else body

    def _attention(self, resid: Tensor, mask: Tensor | None) -> Tensor:
        """The stream [sequences, seq, hidden] with attention added."""
        source = self._source(self.attn_norm, resid, self.attn.num_source_users())
        return resid + self.attn(self.attn_norm(resid), mask, source)

    def _source(self, norm: RMSNorm, x: Tensor, users: int, plain: bool = False) -> Recomputed[Tensor] | None:
        return norm.recomputed(x, users, plain) if self.recompute.norm else None

    def _dense(self, resid: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        assert self.ffn is not None, f"{self.name} is not dense"
        resid = self._attention(resid, mask)
        return (resid + self.ffn(self.ffn_norm(resid), self._source(self.ffn_norm, resid, 1)),)

    def _attend(self, resid: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.moe is not None, f"{self.name} does not route"
        resid = self._attention(resid, mask)
        ffn_in = self.ffn_norm(resid)
        return resid, ffn_in, *self.moe.router(ffn_in, self._source(self.ffn_norm, resid, 1, plain=True))

    def _shared(self, resid: Tensor, ffn_in: Tensor) -> tuple[Tensor]:
        assert self.moe is not None and self.moe.shared is not None, f"{self.name} has no shared expert"
        return (resid + self.moe.shared(ffn_in, self._source(self.ffn_norm, resid, 1)),)

    def _experts(self, rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> tuple[Tensor]:
        assert self.moe is not None, f"{self.name} does not route"
        return (self.moe.experts(rows, row_weights, row_counts),)
