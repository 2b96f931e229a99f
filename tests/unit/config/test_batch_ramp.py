"""Sizes and tokens of every step are those of walking the ramp step by step."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config.derive import (
    batch_size_at,
    sequences_before,
    tokens_before,
    tokens_per_step,
    total_steps,
)
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from tests.unit.config.samples import build


def _walked_size(config: RunConfig, layout: ResolvedLayout, tokens: int) -> int:
    """The size of the step that begins after so many tokens, by exact fractions and search."""
    batch = config.batch
    if batch.ramp_start_size is None or tokens >= batch.ramp_tokens:
        return batch.global_batch_size
    growth = batch.global_batch_size - batch.ramp_start_size
    ideal = batch.ramp_start_size + growth * Fraction(tokens, batch.ramp_tokens)
    sizes = range(layout.smallest_batch, batch.global_batch_size + 1, layout.batch_quantum)
    return min(sizes, key=lambda size: (abs(size - ideal), -size))


@settings(max_examples=60, deadline=None)
@given(
    dp=st.integers(1, 3),
    micro=st.integers(1, 2),
    pipeline=st.sampled_from([(1, "single"), (2, "dualpipe"), (3, "1f1b")]),
    multiple=st.integers(1, 12),
    seq_len=st.integers(1, 40),
    start=st.integers(1, 200),
    ramp_tokens=st.integers(1, 20_000),
)
def test_a_ramp_is_its_steps_one_after_another(
    dp: int,
    micro: int,
    pipeline: tuple[int, str],
    multiple: int,
    seq_len: int,
    start: int,
    ramp_tokens: int,
) -> None:
    pp, schedule = pipeline
    unit = dp * micro * (2 * pp if schedule == "dualpipe" else 1)
    config = build(
        layout={"pp": pp, "dp": dp, "schedule": schedule},
        batch={
            "seq_len": seq_len,
            "micro_batch_size": micro,
            "global_batch_size": unit * multiple,
            "ramp_start_size": min(start, unit * multiple),
            "ramp_tokens": ramp_tokens,
        },
    )
    layout = check_layout(config)
    tokens, before = 0, 0
    for step in range(60):
        size = batch_size_at(config, layout, step)
        assert size == _walked_size(config, layout, tokens)
        assert tokens_before(config, layout, step) == tokens
        assert sequences_before(config, layout, step) * seq_len == tokens
        assert size % layout.batch_quantum == 0
        assert max(layout.smallest_batch, before) <= size <= config.batch.global_batch_size
        tokens, before = tokens + size * seq_len, size
    for step in (1, 7, 31):  # taken over from a checkpoint of that step, nothing changes
        resumed = replace(layout, taken_over=(step, tokens_before(config, layout, step)))
        for later in (step, step + 1, step + 20):
            assert batch_size_at(config, resumed, later) == batch_size_at(config, layout, later)
            assert tokens_before(config, resumed, later) == tokens_before(config, layout, later)


def test_a_layout_of_other_sizes_counts_on_from_what_was_seen() -> None:
    ramp = {"seq_len": 4, "global_batch_size": 24, "ramp_start_size": 1, "ramp_tokens": 2000}
    fine = build(layout={"dp": 1}, batch=ramp)
    coarse = build(layout={"dp": 6}, batch=ramp)
    seen = tokens_before(fine, check_layout(fine), 10)
    layout = check_layout(coarse)
    assert seen != tokens_before(coarse, layout, 10), "the case must tell the two apart"
    resumed = replace(layout, taken_over=(10, seen))
    for step in range(10, 60):
        assert tokens_before(coarse, resumed, step) == seen
        size = batch_size_at(coarse, resumed, step)
        assert size == _walked_size(coarse, layout, seen)
        seen += size * 4


def test_without_a_ramp_every_step_is_alike() -> None:
    config = build(batch={"seq_len": 3, "global_batch_size": 5})
    layout = check_layout(config)
    assert [batch_size_at(config, layout, step) for step in (0, 1, 10**9)] == [5, 5, 5]
    assert tokens_before(config, layout, 10**9) == 15 * 10**9


def test_the_published_ramp_starts_where_dualpipe_can_and_ends_at_15360() -> None:
    config = load_config("v3_671b")
    layout = check_layout(config)
    assert (layout.batch_quantum, layout.smallest_batch) == (256, 4096)
    assert (layout.num_microbatches_start, layout.num_microbatches) == (32, 120)
    assert batch_size_at(config, layout, 0) == 4096 and tokens_per_step(config) == 15360 * 4096
    tokens = step = 0
    for size in range(4096, 15360, 256):
        assert batch_size_at(config, layout, step) == size
        # The next size begins with the first step after the ideal has come nearer to it.
        ideal_tokens = Fraction(size + 128 - 3072, 15360 - 3072) * 469_000_000_000
        steps = -((tokens - ideal_tokens) // (size * 4096))
        assert batch_size_at(config, layout, step + int(steps) - 1) == size
        tokens, step = tokens + int(steps) * size * 4096, step + int(steps)
        assert tokens_before(config, layout, step) == tokens
    assert batch_size_at(config, layout, step) == 15360
    assert 460e9 < tokens < 469e9


@pytest.mark.parametrize("name", ["v3_671b", "v3_16b"])
def test_a_run_of_so_many_tokens_ends_with_the_first_step_that_reaches_them(name: str) -> None:
    config = load_config(name)
    layout, wanted = check_layout(config), config.train.total_tokens
    steps = total_steps(config, layout)
    assert wanted is not None
    assert tokens_before(config, layout, steps - 1) < wanted <= tokens_before(config, layout, steps)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 3000), ramp=st.booleans(), limit=st.none() | st.integers(1, 40))
def test_the_number_of_steps_is_that_of_counting(tokens: int, ramp: bool, limit: int | None) -> None:
    growth = {"ramp_start_size": 2, "ramp_tokens": 500} if ramp else {}
    config = build(
        batch={"seq_len": 7, "global_batch_size": 9, **growth},
        train={"total_tokens": tokens, "total_steps": limit},
    )
    layout = check_layout(config)
    counted = seen = 0
    while seen < tokens and (limit is None or counted < limit):
        seen += batch_size_at(config, layout, counted) * 7
        counted += 1
    assert total_steps(config, layout) == counted
