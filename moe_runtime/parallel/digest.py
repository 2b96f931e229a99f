"""Sums over the bits of a tensor that one flipped bit always changes.

The bytes are read as 64-bit words and cut into windows of 128 words (1 KiB). A window's digest is the sum of
its words, each times an odd number of its own, modulo 2^64:

    a word changed by d changes the sum by d x odd, which is zero modulo 2^64 only if d is

so any change within one word shows, whatever it is. Words that change places show too, for the numbers
differ. What can go unseen is made of several words of one window: above all the highest bits of two words,
which cancel. Windows say where in a tensor the change is; the digest of a whole tensor is the digest of its
windows, and so on until one is left.

A sum without weights was rejected: rows written over each other would not show. Folding the high half of each
word into the low one, against that cancelling, was rejected: it takes three times as long (4.5 GB/s on one
core of a CPU against 13), and what it is for is one bit that turned over. A cryptographic hash was rejected:
slower still, and nothing on a GPU.
"""

import torch
from torch import Tensor

WORD_BYTES = 8
WINDOW_WORDS = 128
WINDOW_BYTES = WINDOW_WORDS * WORD_BYTES
# Words multiplied at a time where there is no integer matrix product: bounds memory.
_STRETCH_WORDS = 2**22


def window_digests(tensor: Tensor) -> Tensor:
    """The digest of every window of a tensor's bytes, int64 [windows], on its device.

    Args:
        tensor: contiguous, of any dtype and shape; the last window is filled up with zeros.
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    whole = raw.numel() // WINDOW_BYTES * WINDOW_BYTES
    windows = [_digest_rows(raw[:whole].view(torch.int64).view(-1, WINDOW_WORDS))]
    if whole < raw.numel():
        rest = raw.new_zeros(WINDOW_BYTES)
        rest[: raw.numel() - whole] = raw[whole:]
        windows.append(_digest_rows(rest.view(torch.int64).view(1, WINDOW_WORDS)))
    return torch.cat(windows)


def digest(tensor: Tensor) -> Tensor:
    """One digest of a whole tensor, int64 [1], on its device; zero of an empty one."""
    windows = window_digests(tensor)
    while windows.numel() > 1:
        windows = window_digests(windows)
    return windows if windows.numel() else windows.new_zeros(1)


def _digest_rows(rows: Tensor) -> Tensor:
    """int64 [windows, 128] -> int64 [windows]."""
    weights = _WEIGHTS.to(rows.device)
    if rows.device.type == "cpu":
        return torch.mv(rows, weights)
    stretches = rows.split(_STRETCH_WORDS // WINDOW_WORDS)
    return torch.cat([(stretch * weights).sum(dim=1) for stretch in stretches])


def _odd_numbers(count: int) -> Tensor:
    """Odd 64-bit numbers without a pattern: splitmix64 of 0, 1, 2 ..."""
    numbers = []
    for index in range(1, count + 1):
        word = index * 0x9E3779B97F4A7C15 % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word = (word ^ (word >> 31)) | 1
        numbers.append(word - 2**64 if word >= 2**63 else word)
    return torch.tensor(numbers, dtype=torch.int64)


_WEIGHTS = _odd_numbers(WINDOW_WORDS)
