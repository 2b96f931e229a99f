"""Random bits that are a function of where they are used: (seed, step, group, element) -> 32 bits.

Stochastic rounding wants noise that is the same however the elements are laid out: split over other
ranks, walked in other chunks, on another device, or resumed from a checkpoint. A generator with a
stream has none of this, for its state depends on who drew before. A counter-based one hashes the
coordinates, and nothing has to be saved.

The key (seed, step, group, stream) is mixed to 64 bits in plain Python integers, once a call. An
element's index is then hashed with it by two rounds of xor-shift and odd multiplication on int32,
which wraps around alike on every device; half of the key goes in before each round, so that two keys
never give shifted copies of one sequence. A third round is a quarter more work and no test of ours
tells it from two. Philox was rejected: its 32 x 32 -> 64 bit products need
int64, four times the work in eager tensors, for a quality that rounding noise has no use for.

torch's shift of a signed integer draws in the sign, which would clear the top bit (sign ^ sign) and
break the bijection; the bits drawn in are masked off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_WORD = 1 << 32
# Odd multipliers and shifts known for good avalanche in two rounds; the tests measure it.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
SECOND_MULTIPLIER = 741103597


@dataclass(frozen=True)
class NoiseKey:
    """Everything that random bits depend on, save the element.

    Args:
        value: 64 mixed bits of seed, step, group and stream.
    """

    value: int

    def words(self, high: int) -> tuple[int, int]:
        """Two 32-bit words for elements whose index divided by 2^32 is `high`."""
        mixed = _mix(self.value ^ _mix(high))
        return mixed % _WORD, mixed // _WORD


def derive_key(seed: int, step: int, group_id: int, stream: int = 0) -> NoiseKey:
    """Key of one use of noise.

    Args:
        seed: of the run.
        step: optimizer step, counted from 1.
        group_id: parameter group.
        stream: tells apart several uses within a step.
    """
    value = 0
    for coordinate in (seed, step, group_id, stream):
        value = _mix(value ^ (coordinate & _MASK_64))
    return NoiseKey(value)


def random_bits(key: NoiseKey, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Bits of elements start .. start + count - 1.

    Args:
        start: global index of the first element, below 2^64.

    Returns:
        int32 [count], uniform in all bits; element i has the same bits whatever `start` was.
    """
    until_carry = _WORD - start % _WORD
    if count > until_carry:
        head = random_bits(key, start, until_carry, device)
        return torch.cat([head, random_bits(key, start + until_carry, count - until_carry, device)])
    first, second = key.words(start // _WORD)
    bits = torch.arange(count, dtype=torch.int32, device=device).add_(as_signed(start + first))
    return _hash(bits, as_signed(second))


def random_rows(keys: Sequence[NoiseKey], start: int, count: int) -> Tensor:
    """`random_bits` of several keys at once, int32 [keys, count] on the CPU; no carry may lie within."""
    assert start // _WORD == (start + count) // _WORD, f"expected no carry in {start} + {count}"
    words = [key.words(start // _WORD) for key in keys]
    first, second = (
        torch.tensor([as_signed(word) for word in column]) for column in zip(*words, strict=True)
    )
    bits = torch.arange(count).add(as_signed(start)) + first.unsqueeze(1)
    return _hash(bits.to(torch.int32), second.to(torch.int32).unsqueeze(1))


def kernel_words(key: NoiseKey, start: int) -> tuple[tuple[int, int, int, int], int]:
    """What a kernel needs to make the bits of elements start, start + 1, ... for itself.

    Element start + i of `random_bits` is the hash of i + first with second, all in 32 bits.

    Args:
        start: global index of the first element.

    Returns:
        ((first, second, next_first, next_second), carry): 32-bit words; the first two up to element
        start + carry, which is the next multiple of 2^32, the other two for the 2^32 elements from there.
    """
    first, second = key.words(start // _WORD)
    next_first, next_second = key.words(start // _WORD + 1)
    shifted = (start + first) % _WORD, (start + next_first) % _WORD
    return (shifted[0], second, shifted[1], next_second), _WORD - start % _WORD


def second_draw(bits: Tensor) -> Tensor:
    """Another draw from the same `bits`, in place, at the price of one multiplication.

    Pairs (u, a u mod 2^k) of the lower k bits lie on a lattice; this a is one of L'Ecuyer's for which
    it has no gaps worth naming, so the two are independent for all that rounding can tell.
    """
    return bits.mul_(SECOND_MULTIPLIER)


def _hash(bits: Tensor, second: int | Tensor) -> Tensor:
    """Two rounds over int32 `bits`, in place; `second` comes in between."""
    scratch = torch.empty_like(bits)
    _fold(bits, SHIFTS[0], scratch).mul_(as_signed(MULTIPLIERS[0])).add_(second)
    _fold(bits, SHIFTS[1], scratch).mul_(as_signed(MULTIPLIERS[1]))
    return _fold(bits, SHIFTS[2], scratch)


def _fold(bits: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """bits ^= bits >> shift, the shift a logical one."""
    torch.bitwise_right_shift(bits, shift, out=scratch).bitwise_and_((1 << (32 - shift)) - 1)
    return bits.bitwise_xor_(scratch)


def _mix(value: int) -> int:
    """A bijection of 64-bit integers with full avalanche."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def as_signed(word: int) -> int:
    """The int32 with the bits of `word` modulo 2^32."""
    return (word + _WORD // 2) % _WORD - _WORD // 2
