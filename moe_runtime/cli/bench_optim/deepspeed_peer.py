"""DeepSpeed's AdamW for the CPU, as a contender."""

import torch
from torch import Tensor


def open_cpu_adam(param: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam in AdamW mode over one FP32 parameter; compiles it where that was never done.

    Raises:
        Exception: whatever DeepSpeed raises where it cannot be built.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
        [param], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, adamw_mode=True
    )
    return optimizer
