"""What the units of this CPU multiply."""

import functools

import torch


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """True where the CPU has BF16 dot products or tiles; read once, it cannot change."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
