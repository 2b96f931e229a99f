"""How far an approximate tensor is from an exact one: two numbers that FP8 work is judged by."""

import math

from torch import Tensor


def difference(exact: Tensor, approximate: Tensor) -> float:
    """1 - 2<x, y> / (|x|^2 + |y|^2), in FP64: DeepGEMM's metric; 0 for equal tensors, zeros included."""
    x, y = exact.double(), approximate.double()
    energy = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / energy if energy else 0.0


def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """Signal to quantisation noise, 20 log10(|x| / |x - y|), in dB; infinite for equal tensors."""
    x, y = exact.double(), approximate.double()
    noise, signal = float((x - y).norm()), float(x.norm())
    return 20 * math.log10(signal / noise) if noise and signal else (-math.inf if noise else math.inf)


def row_sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """Mean over rows of each row's own signal to noise, in dB: what small rows keep beside large ones.

    One number for all rows says only how the largest fared. No row may be zero, or equal in both.
    """
    x, y = exact.double(), approximate.double()
    return float((x.norm(dim=1) / (x - y).norm(dim=1)).log10().mean() * 20)
