"""Which FP8 products run here, in one line for people."""

import torch

from moe_runtime.fp8 import gemm_choice


def which_path(device: torch.device) -> str:
    """What multiplied so far, by role; on a CPU that it is emulated."""
    used = gemm_choice.used()
    if device.type == "cpu" and not used:
        return "FP8 products: emulated on the CPU (reference): the values of FP8 without its speed"
    name = gemm_choice.device_name(device)
    parts = [f"{role} {' and '.join(sorted(used[role]))}" for role in gemm_choice.ROLES if role in used]
    return f"FP8 products on {name}: {', '.join(parts) or 'none so far'}"
