"""Sampling against its definition, and against the frequencies it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.errors import ConfigError, NumericsError
from moe_runtime.generate.sampling import (
    SHORTLISTS,
    Filters,
    SamplingParams,
    filtered_probs,
    keep_top_k,
    keep_top_p,
    pick,
    sample_token,
)
from tests.unit.generate.goodness_of_fit import g_test_p_value


def filter_oracle(logits: list[float], temperature: float, top_k: int, top_p: float) -> Tensor:
    """Take tokens from the likeliest down, one by one."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0.0:
        return torch.nn.functional.one_hot(torch.tensor(order[0]), len(logits)).double()
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, dim=0)
    order = order[: top_k or len(order)]
    among = float(probs[order].sum())
    kept, held = torch.zeros_like(probs), 0.0
    for token in order:
        kept[token] = probs[token]
        held += float(probs[token]) / among
        if held >= top_p:
            break
    return kept / kept.sum()


# Multiples of 1/2, so that ties are frequent; shares that no sum of few tokens hits by chance.
LOGITS = st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=1, max_size=12)
TEMPERATURES = st.sampled_from([0.0, 0.3, 1.0, 1.7])
SHARES = st.sampled_from([1e-9, 0.1234567, 0.5432101, 0.9123457, 1.0])


@settings(max_examples=100, deadline=None)
@given(LOGITS, TEMPERATURES, st.integers(0, 13), SHARES)
def test_filters_are_what_taking_tokens_one_by_one_gives(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    found = filtered_probs(torch.tensor(logits, dtype=torch.float64), temperature, top_k, top_p)
    # 1e-12: the order of summation differs.
    torch.testing.assert_close(
        found, filter_oracle(logits, temperature, top_k, top_p), atol=1e-12, rtol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(TEMPERATURES, st.integers(0, 8), SHARES), max_size=4, min_size=2),
)
def test_rows_with_filters_of_their_own_are_what_each_is_alone(
    seed: int, choices: list[tuple[float, int, float]]
) -> None:
    logits = torch.randn(len(choices), 3, 7, generator=torch.Generator().manual_seed(seed)).mul_(2).round_()
    filters = Filters.of([SamplingParams(*choice) for choice in choices])
    found = filters.probs(logits)
    alone = torch.stack([filtered_probs(row, *choice) for row, choice in zip(logits, choices, strict=True)])
    torch.testing.assert_close(found, alone, atol=0, rtol=1e-6)
    torch.testing.assert_close(
        filters.keep(torch.tensor([1])).probs(logits[1:2]), alone[1:2], atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])  # as wide as all tokens, as a list, as a short one
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_beyond_the_shortlist_is_the_same_set(spread: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    probs = torch.softmax(spread * torch.randn(SHORTLISTS[1] + 100, generator=generator).double(), dim=0)
    expected = filter_oracle(probs.log().tolist(), 1.0, 0, top_p)
    torch.testing.assert_close(keep_top_p(probs, top_p), expected, atol=1e-12, rtol=0)


def test_a_forbidden_token_stays_forbidden() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf])
    assert filtered_probs(logits, 1.0, 2, 0.999).tolist() == [0.0, 1.0, 0.0]
    assert keep_top_k(logits, 2).isinf().tolist() == [True, False, True]


def test_a_tiny_temperature_is_greedy_and_stays_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1.0, 2.0, 1.0]])
    assert filtered_probs(logits, 1e-30).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_narrow_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(2, 9, dtype=torch.bfloat16)
    torch.testing.assert_close(filtered_probs(logits, 0.7), torch.softmax(logits.float() / 0.7, dim=-1))
    assert filtered_probs(logits.double(), 0.7).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_diverged_model_are_refused_in_one_line(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    u = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"^sampling: expected finite logits, got .*diverged$"):
        pick(filtered_probs(logits, temperature), u)
    with pytest.raises(NumericsError, match="expected finite logits"):
        pick(filtered_probs(torch.full((1, 4), -torch.inf), temperature), u[:1])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_k": -2}, r"top_k: expected 0 \(all tokens\) or more, got -2"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
    ],
)
def test_a_param_out_of_range_is_refused(params: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_picked_tokens_have_the_promised_frequencies() -> None:
    generator = torch.Generator().manual_seed(5)
    for spread in (0.3, 1.0, 3.0):
        probs = torch.softmax(spread * torch.randn(40, generator=generator), dim=0)
        probs[[0, 7, 39]] = 0.0
        u = torch.rand(20_000, generator=generator, dtype=torch.float64)
        counts = torch.bincount(pick(probs.expand(20_000, 40), u), minlength=40)
        assert g_test_p_value(counts, probs.double() / probs.double().sum()) > 1e-3
        wrong = torch.roll(probs, 1).double()
        assert g_test_p_value(counts, wrong / wrong.sum()) < 1e-6


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_token_of_probability_zero_is_never_picked(u: float, scale: float) -> None:
    for zeros in ([0], [4], [0, 1, 3, 4], [2]):
        probs = torch.full((1, 5), 0.3 * scale)
        probs[0, zeros] = 0.0
        assert int(pick(probs, torch.tensor([u], dtype=torch.float64))) not in zeros


def test_ends_of_the_unit_interval_pick_the_first_and_the_last() -> None:
    probs = torch.softmax(torch.randn(2, 130_000, generator=torch.Generator().manual_seed(0)), dim=-1)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert pick(probs, u).tolist() == [0, 129_999]


def test_nothing_to_pick_from_is_refused() -> None:
    for row in ([0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(NumericsError, match="expected finite logits"):
            pick(torch.tensor([row]), torch.zeros(1, dtype=torch.float64))


def test_sample_token_repeats_with_its_generator_and_keeps_the_shape() -> None:
    logits = torch.randn(300, 9, generator=torch.Generator().manual_seed(1))
    first = sample_token(logits, 1.0, 0.9, torch.Generator().manual_seed(5))
    assert torch.equal(first, sample_token(logits, 1.0, 0.9, torch.Generator().manual_seed(5)))
    assert sample_token(logits[0], 0.5, 0.9).shape == ()
    assert torch.equal(sample_token(logits, 0.0, 0.9), logits.argmax(dim=-1))
