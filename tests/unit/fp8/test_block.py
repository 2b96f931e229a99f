"""Weights in 128 x 128 blocks on a CPU: against the fractions of the reference, transposed, special."""

import math

import pytest
import torch

from moe_runtime.fp8.cast import cast_weight, cast_weight_both, decode
from moe_runtime.fp8.cast_reference import E4M3_LAW, reference_blocks, reference_value
from moe_runtime.fp8.tiled import TILE, Blocks
from tests.unit.comm.wire_values import same_bits, special_tiles
from tests.unit.fp8.fp8_values import mixed, poisoned, same

SHAPES = [(1, 1), (127, 129), (128, 128), (130, 140), (256, 5), (0, 7), (7, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_cast_as_the_reference_casts_them(shape: tuple[int, int]) -> None:
    weight = mixed(*shape, seed=1) if min(shape) else torch.empty(shape)
    for w in (weight, poisoned(weight).bfloat16()):
        assert same(cast_weight(w), reference_blocks(w))


def test_special_values_fill_or_poison_their_block_alone() -> None:
    specials = special_tiles(128)
    weight = torch.randn(specials.shape[0] * TILE, 256, generator=torch.Generator().manual_seed(0))
    for block, row in enumerate(specials):
        weight[block * TILE : (block + 1) * TILE, :128] = 0.0 if row.isfinite().all() else 1.0
        weight[block * TILE + 77, :128] = row
    values = decode(cast_weight(weight))
    for block, row in enumerate(specials):
        made = values[block * TILE : (block + 1) * TILE]
        assert made[:, :128].isnan().all() == (not row.isfinite().all())
        assert made[:, 128:].isfinite().all()


def test_experts_are_blocks_each_for_itself() -> None:
    weight = torch.randn(3, 130, 9, generator=torch.Generator().manual_seed(2))
    together = cast_weight(weight)
    for expert in range(3):
        assert same(Blocks(together.codes[expert], together.scales[expert]), reference_blocks(weight[expert]))
    assert same(cast_weight(weight.view(1, 3, 130, 9)[:, 1]), cast_weight(weight[1:2]))


def test_decoding_says_code_times_scale() -> None:
    weight = torch.randn(2, 130, 140, generator=torch.Generator().manual_seed(3))
    weight[1, 129, 139] = math.inf
    blocks = cast_weight(weight)
    values = decode(blocks)
    for expert, row, column in ((0, 0, 0), (0, 129, 139), (1, 127, 128), (1, 128, 128), (1, 3, 127)):
        scale = float(blocks.scales[expert, row // TILE, column // TILE])
        wanted = reference_value(int(blocks.codes[expert, row, column]), scale, E4M3_LAW)
        assert same_bits(values[expert, row, column], torch.tensor(wanted))
    assert same_bits(decode(blocks, torch.bfloat16).float(), values)


def test_the_cast_of_a_transposed_weight_is_the_transposed_cast() -> None:
    weight = mixed(130, 300, seed=4)
    assert same(cast_weight(weight.t()), cast_weight(weight).transposed())
    both = cast_weight_both(weight)
    assert same(both[0], cast_weight(weight)) and same(both[1], cast_weight(weight.t()))
    assert same_bits(decode(cast_weight(weight).transposed()), decode(cast_weight(weight)).t().contiguous())
