"""The noise is a function of its coordinates, and cannot be told from chance by what rounding can see."""

import torch
from moe_comm.wire.formats import FRACTION_BITS

from moe_runtime.optim.counter_rng import derive_key, random_bits, random_rows, second_draw

COUNT = 1 << 17


def as_fractions(bits: torch.Tensor) -> torch.Tensor:
    """Uniform in [-1/2, 1/2), FP64."""
    return bits.double() / 2**32


def chi_square_sigmas(cells: torch.Tensor, num_cells: int) -> float:
    """How many standard deviations a histogram is from uniform."""
    expected = cells.numel() / num_cells
    counts = torch.bincount(cells, minlength=num_cells).double()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (num_cells - 1)) / (2 * num_cells) ** 0.5


def test_bits_depend_on_the_element_and_not_on_where_the_call_began() -> None:
    key = derive_key(seed=1, step=2, group_id=3)
    whole = random_bits(key, 1000, 5000)
    parts = [random_bits(key, 1000 + start, 1250) for start in range(0, 5000, 1250)]
    assert torch.equal(whole, torch.cat(parts))


def test_bits_go_on_across_two_to_the_32_and_differ_beyond_it() -> None:
    key, edge = derive_key(seed=1, step=2, group_id=3), 1 << 32
    across = random_bits(key, edge - 100, 300)
    assert torch.equal(across[:100], random_bits(key, edge - 100, 100))
    assert torch.equal(across[100:], random_bits(key, edge, 200))
    assert (across[100:] != random_bits(key, 0, 200)).all()


def test_rows_of_several_keys_are_the_bits_of_each() -> None:
    keys = [derive_key(seed, step=2, group_id=3) for seed in range(20)]
    for start in (0, 256, (1 << 31) - 100, (1 << 32) + 5, (1 << 40) + (1 << 31) + 7):
        rows = torch.stack([random_bits(key, start, 300) for key in keys])
        assert torch.equal(random_rows(keys, start, 300), rows)


def test_each_coordinate_of_the_key_changes_the_bits() -> None:
    base = {"seed": 5, "step": 7, "group_id": 1, "stream": 0}
    bits = random_bits(derive_key(**base), 0, 256)
    for name in base:
        other = random_bits(derive_key(**{**base, name: base[name] + 1}), 0, 256)
        assert (bits == other).float().mean() < 0.02, name


def test_known_bits_never_change_for_they_are_part_of_resuming() -> None:
    bits = random_bits(derive_key(seed=1234, step=1, group_id=0), 0, 4)
    assert bits.tolist() == [225356711, -1357297428, -817385327, 238149913]


def test_bits_equal_the_same_hash_in_unbounded_integers() -> None:
    key, start = derive_key(seed=9, step=4, group_id=2, stream=1), (7 << 32) + 0xFFFFFF00
    first, second = key.words(7)

    def slow(index: int) -> int:
        x = (index + first) % 2**32
        x = ((x ^ (x >> 16)) * 0x7FEB352D + second) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    bits = random_bits(key, start, 200).long() & 0xFFFFFFFF
    assert bits.tolist() == [slow(start % 2**32 + i) for i in range(200)]


def test_bits_are_uniform_at_the_top_at_the_bottom_and_where_rounding_reads_them() -> None:
    bits = random_bits(derive_key(11, 1, 0), 0, COUNT).long() & 0xFFFFFFFF
    for shift in (0, 8, 16, FRACTION_BITS - 8, 24):
        assert abs(chi_square_sigmas((bits >> shift) & 0xFF, 256)) < 5, shift


def test_neighbours_blocks_steps_and_groups_are_uncorrelated() -> None:
    noise = as_fractions(random_bits(derive_key(11, 1, 0), 0, COUNT))
    one_sigma = 1 / 12 / COUNT**0.5
    for lag in (1, 2, 64, 127, 128, 129, 4096):
        assert (noise[lag:] * noise[:-lag]).mean().abs() < 5 * one_sigma, lag
    for step, group in [(2, 0), (3, 0), (17, 0), (1, 1), (2, 1)]:
        other = as_fractions(random_bits(derive_key(11, step, group), 0, COUNT))
        assert (noise * other).mean().abs() < 5 * one_sigma, (step, group)


def test_one_element_over_many_steps_is_as_random_as_many_elements() -> None:
    steps, elements = 400, 4096
    total = sum(as_fractions(random_bits(derive_key(3, s, 0), 0, elements)) for s in range(steps))
    z = total / (steps / 12) ** 0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / elements) ** 0.5
    assert float(z.abs().max()) < 6


def test_flipping_one_bit_of_the_index_flips_half_of_the_output() -> None:
    bits = random_bits(derive_key(3, 1, 0), 0, 1 << 14)
    index = torch.arange(1 << 14)
    for position in range(14):
        flipped = bits ^ bits[index ^ (1 << position)]
        shares = torch.stack([((flipped >> out) & 1).float().mean() for out in range(32)])
        assert (shares - 0.5).abs().max() < 0.03, position  # 4 sigma are 0.02


def test_second_draw_is_independent_of_the_first() -> None:
    bits = random_bits(derive_key(3, 1, 0), 0, 1 << 19)
    mask, cells = (1 << FRACTION_BITS) - 1, 6
    first = (bits & mask) >> (FRACTION_BITS - cells)
    second = (second_draw(bits.clone()) & mask) >> (FRACTION_BITS - cells)
    assert abs(chi_square_sigmas(((first << cells) + second).long(), 1 << 2 * cells)) < 5
