"""Rotary positions and YaRN against complex numbers and the report's formulas, one by one."""

import cmath
import math

import pytest
import torch

from moe_runtime.config.schema import YarnConfig
from moe_runtime.model.mla import MLA
from moe_runtime.model.rope import Rotary, frequencies, rotate, softmax_factor
from moe_runtime.model.transformer import KEEP_ALL
from tests.unit.model.samples import F64, draw, small_config

CPU = torch.device("cpu")
THETA = 10000.0


def test_interleaved_pairs_are_multiplied_by_complex_numbers() -> None:
    dim, x = 6, draw(2, 5, 3, 6)
    out = rotate(x, Rotary(dim, THETA, None).table(5, F64, CPU))
    for batch in range(2):
        for position in range(5):
            for head in range(3):
                for pair in range(dim // 2):
                    a, b = x[batch, position, head, 2 * pair : 2 * pair + 2].tolist()
                    turned = complex(a, b) * cmath.exp(1j * position * THETA ** (-2 * pair / dim))
                    got = out[batch, position, head, 2 * pair : 2 * pair + 2].tolist()
                    assert got == pytest.approx([turned.real, turned.imag], rel=1e-13, abs=1e-14)


def test_conjugate_turns_back_and_scores_depend_on_distance_alone() -> None:
    turns = Rotary(8, THETA, None).table(12, F64, CPU)
    x, y = draw(1, 12, 1, 8), draw(8, seed=1)
    torch.testing.assert_close(rotate(rotate(x, turns), turns.conj()), x, rtol=1e-13, atol=1e-14)
    same = rotate(draw(8, seed=2).expand(1, 12, 1, 8), turns)[0, :, 0]
    keys = rotate(y.expand(1, 12, 1, 8), turns)[0, :, 0]
    scores = same @ keys.T
    torch.testing.assert_close(scores[9, 6], scores[4, 1], rtol=1e-12, atol=0)


def test_tables_are_rounded_once_and_a_longer_one_begins_with_a_shorter() -> None:
    rotary = Rotary(8, THETA, None)
    short = rotary.table(3, torch.float32, CPU).clone()
    long = rotary.table(5000, torch.float32, CPU)
    assert short.dtype == torch.complex64 and torch.equal(long[:3], short)
    assert torch.equal(long, rotary.table(5000, F64, CPU).to(torch.complex64))


def yarn_oracle(dim: int, theta: float, yarn: YarnConfig) -> list[float]:
    """Frequencies pair by pair: kept, divided by s, or on the ramp between the two bounds."""

    def bound(turns: float) -> float:
        return dim * math.log(yarn.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(bound(yarn.beta_fast)), 0), min(math.ceil(bound(yarn.beta_slow)), dim - 1)
    out = []
    for pair in range(dim // 2):
        base = 1 / theta ** (2 * pair / dim)
        if pair <= low:
            out.append(base)
        elif pair >= high:
            out.append(base / yarn.factor)
        else:
            share = (pair - low) / (high - low)
            out.append(base / yarn.factor * share + base * (1 - share))
    return out


@pytest.mark.parametrize("dim", [8, 64])
def test_yarn_frequencies_equal_the_formula(dim: int) -> None:
    got = frequencies(dim, THETA, YarnConfig())
    assert got.dtype == F64
    assert got.tolist() == pytest.approx(yarn_oracle(dim, THETA, YarnConfig()), rel=1e-13)


def test_yarn_of_the_published_model_keeps_eleven_pairs_and_divides_the_last_nine() -> None:
    """dim 64, theta 10,000, 4,096 tokens, beta 32 and 1: bounds 10 and 23. Ref: DSV3 §4.3."""
    plain, yarn = frequencies(64, THETA), frequencies(64, THETA, YarnConfig())
    ratio = (plain / yarn).tolist()
    assert ratio[:11] == pytest.approx([1.0] * 11) and ratio[23:] == pytest.approx([40.0] * 9)
    assert all(1.0 < value < 40.0 for value in ratio[11:23])


def test_softmax_factor_is_1_874_for_forty_times_and_one_without_yarn() -> None:
    assert softmax_factor(YarnConfig()) == pytest.approx(1.874, abs=5e-4)
    assert softmax_factor(YarnConfig(factor=1.0)) == 1.0 and softmax_factor(None) == 1.0


def test_attention_scales_its_scores_by_the_softmax_factor() -> None:
    config = small_config(yarn=YarnConfig())
    rotary = Rotary(config.qk_rope_head_dim, THETA, config.yarn)
    mla = MLA(config, rotary, KEEP_ALL, dtype=F64)
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert mla.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(width), rel=1e-14)
