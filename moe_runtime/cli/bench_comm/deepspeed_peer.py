"""DeepSpeed's own MoE layer with our weights in it: the peer of a whole layer.

Set up as its authors would for training without dropped tokens: gather-based encode and decode (0.19.4
and later), no random token selection, capacity as large as the fullest expert needs. Each of its experts
is our dense SwiGLU, so the layers differ in how tokens travel and in what is padded, not in the GEMMs.
"""

import io
from contextlib import redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.parallel.zero_engine import join_process_group


def open_deepspeed_layer(settings: Settings, gate: Tensor, gate_up: Tensor, down: Tensor) -> nn.Module:
    """The layer, with these weights; its forward gives (output, auxiliary loss, counts).

    Args:
        settings: shape.
        gate: FP32 [num_experts, hidden].
        gate_up: FP32 [local_experts, 2f, hidden].
        down: FP32 [local_experts, hidden, f].
    """
    from deepspeed.moe.layer import MoE  # seconds to import

    join_process_group()
    expert = SwiGLU(settings.hidden, settings.expert_width)
    with redirect_stdout(io.StringIO()):
        layer = MoE(
            settings.hidden,
            expert,
            num_experts=settings.num_experts,
            ep_size=dist.get_world_size(),
            k=settings.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
            min_capacity=0,
        )
        layer.set_deepspeed_parallelism()
    inner = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(gate)
        for index, own in enumerate(inner.experts.deepspeed_experts):
            own.gate_up.weight.copy_(gate_up[index])
            own.down.weight.copy_(down[index])
    return layer
