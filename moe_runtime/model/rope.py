"""Rotary positions in interleaved pairs, with YaRN for contexts beyond the original one.

A pair (x0, x1) of the rotary part is the complex number x0 + i x1; position p turns it by p times the pair's
frequency. Frequencies and angles are computed in FP64 and rounded once, so that every dtype and every layout
sees the same table. Tables are made at the first use of a length and kept by the object; one that proves too
short is made twice as long, since decoding asks for one position more at every pass.

YaRN (Ref: DSV3 §4.3) leaves fast pairs as they are, divides slow ones by the factor s and blends
between; the softmax scale grows by (0.1 mscale ln s + 1)^2. Both hold for the model as a whole, whenever
its config has a `yarn` section: a frequency that depended on the length of the present batch would turn
the keys of one text differently from call to call.
"""

import math

import torch
from torch import Tensor

from moe_runtime.config.schema import YarnConfig


def frequencies(dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Turn of each pair per position, in radians: float64 [dim / 2].

    Args:
        dim: width of the rotary part, even.
        theta: base of the geometric series.
        yarn: context extension, or None.
    """
    base = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if yarn is None or yarn.factor <= 1.0:
        return base

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns over the original context."""
        return dim * math.log(yarn.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    slow = ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return base * (1.0 - slow) + base / yarn.factor * slow


def softmax_factor(yarn: YarnConfig | None) -> float:
    """What YaRN multiplies the softmax scale by; 1.874 for s = 40. Ref: DSV3 §4.3."""
    if yarn is None or yarn.factor <= 1.0:
        return 1.0
    return (0.1 * yarn.mscale * math.log(yarn.factor) + 1.0) ** 2


class Rotary:
    """The rotary tables of a model.

    Args:
        dim: width of the rotary part, even.
        theta: base of the frequencies.
        yarn: context extension, or None.
    """

    def __init__(self, dim: int, theta: float, yarn: YarnConfig | None) -> None:
        self.softmax_factor = softmax_factor(yarn)
        self._frequencies = frequencies(dim, theta, yarn)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def table(self, seq_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unit complex numbers [seq_len, dim / 2] for positions 0..seq_len-1; `dtype` FP32 or FP64."""
        key = (dtype, device)
        table = self._tables.get(key)
        if table is None or table.shape[0] < seq_len:
            length = seq_len if table is None else max(seq_len, 2 * table.shape[0])
            angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), self._frequencies)
            turns = torch.polar(torch.ones_like(angles), angles)
            table = turns.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
            self._tables[key] = table
        return table[:seq_len]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn interleaved pairs of x [..., seq_len, heads, dim] by turns [seq_len, dim / 2]; Ref: DSV3 (3).

    x must be FP32 or FP64. Pass the conjugate of `turns` to turn back, which is the backward pass.
    """
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2)
