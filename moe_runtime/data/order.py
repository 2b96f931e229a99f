"""A permutation of 0..size-1 for every (seed, epoch), by arithmetic alone.

A Feistel network over the smallest power of two that holds `size` permutes its domain whatever its
round function is; a value that lands outside 0..size-1 is sent through again until it lands inside
(cycle walking), which keeps the map a bijection. The domain is less than twice the size, so a value
takes less than two passes on average. No table is kept: sample n of any epoch is found from n, and
resuming needs the number alone. A table (torch.randperm) would cost 8 bytes a sample and epoch on
every rank, and its values may change between library versions.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
Words = NDArray[np.uint64]


def permuted(
    positions: NDArray[np.int64], epochs: NDArray[np.int64], size: int, seed: int
) -> NDArray[np.int64]:
    """Where each position of each epoch's order lies in the unshuffled list.

    Args:
        positions: 0..size-1, any shape.
        epochs: epoch of each position, same shape.
        size: number of things in an epoch.
        seed: any whole number.

    Returns:
        int64, same shape, 0..size-1; for a fixed epoch a bijection of the positions.
    """
    bits = (size - 1).bit_length()
    shifts = (bits // 2, bits - bits // 2)
    keys = _round_keys(epochs.ravel(), seed)
    values = positions.ravel().astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[:, outside], shifts)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64).reshape(positions.shape)


def _feistel(values: Words, keys: Words, shifts: tuple[int, int]) -> Words:
    """One pass over the domain of 2^(high + low bits); each round changes one half by the other."""
    low_bits = np.uint64(shifts[1])
    high_mask, low_mask = (np.uint64((1 << shift) - 1) for shift in shifts)
    high, low = values >> low_bits, values & low_mask
    for number in range(0, ROUNDS, 2):
        high ^= _mix(low ^ keys[number]) & high_mask
        low ^= _mix(high ^ keys[number + 1]) & low_mask
    return (high << low_bits) | low


def _round_keys(epochs: NDArray[np.int64], seed: int) -> Words:
    """One key per round and value, uint64 [rounds, values]."""
    start = _mix(np.full(epochs.shape, seed % 2**64, dtype=np.uint64))
    start = _mix(start ^ epochs.astype(np.uint64))
    return np.stack([_mix(start + np.uint64(number + 1)) for number in range(ROUNDS)])


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
