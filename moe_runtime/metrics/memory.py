"""How much memory this rank has held, and whether its allocator had to struggle for it."""

import resource

import torch

_KIB = 1024


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since the process began: of the device's allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def alloc_retries(device: torch.device) -> int:
    """Times that a GPU's allocator freed its cache and asked again; each costs a wait for the device."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0
