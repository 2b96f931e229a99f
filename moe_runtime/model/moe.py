"""The mixture-of-experts FFN of one layer: its parts, without the journey between them. Ref: DSV3 (12)."""

import torch
from torch import nn

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.experts import Experts
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.model.router import Router


class MoE(nn.Module):
    """Router, routed experts and shared experts. `block` says in which order they run.

    Shared experts are one SwiGLU of their summed width: the sum of their outputs, in two GEMMs.

    Args:
        config: widths and counts.
        num_local_experts: routed experts held here.
        first_expert: global number of the first of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        recompute: RecomputeConfig,
        num_local_experts: int,
        first_expert: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.expert_ffn_size
        self.first_expert = first_expert
        self.router = Router(
            hidden,
            config.num_experts,
            config.top_k,
            config.num_groups,
            config.num_groups_kept,
            config.routed_scaling_factor,
            dtype,
            device,
        )
        self.experts = Experts(num_local_experts, hidden, width, recompute.swiglu, dtype, device)
        self.shared: SwiGLU | None = None
        if config.num_shared_experts > 0:
            shared_width = config.num_shared_experts * width
            self.shared = SwiGLU(hidden, shared_width, recompute.swiglu, dtype, device)
