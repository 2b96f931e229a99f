"""Loss by position: what each target is told by, and what the means and ratios are of."""

import pytest
import torch

from moe_runtime.evaluation.by_position import loss_by_position, short_losses, summarise, window_losses
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import F64, draw_tokens, small_config, small_model

OLD = 16


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(small_config(mtp_depth=0), dtype=F64)


def test_losses_of_tokens_have_the_mean_that_training_has(model: Transformer) -> None:
    rows = draw_tokens(model.config, 3, 41)
    losses = window_losses(model, rows)
    assert losses.shape == (3, 40)
    assert losses.mean().item() == pytest.approx(model.losses(rows).loss.item(), rel=1e-12)


@torch.no_grad()
def test_short_losses_are_of_the_same_targets_with_no_more_than_the_old_context(model: Transformer) -> None:
    rows = draw_tokens(model.config, 2, 3 * OLD + 1)
    found = short_losses(model, rows, OLD)
    assert found.shape == (2, 2 * OLD)
    for place, target in enumerate(range(OLD, 3 * OLD)):
        context = OLD - 1 + place % 2  # it slides by two tokens: 15 and 16 of context in turn
        seen = rows[:, target + 1 - context : target + 1]
        expected = -model(seen)[:, -1].log_softmax(1).gather(1, rows[:, target + 1, None]).squeeze(1)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-12, atol=1e-12)


def test_means_and_ratios_are_of_the_positions_that_they_name() -> None:
    # By position: 4 in the first half of the old length, 2 in the second, 3 beyond; 1.5 with short context.
    full = torch.cat((torch.full((5, 8), 4.0), torch.full((5, 8), 2.0), torch.full((5, 48), 3.0)), dim=1)
    found = summarise(full.double(), torch.full((5, 48), 1.5, dtype=F64), OLD)
    assert (found.inside.mean, found.late.mean, found.beyond.mean, found.short.mean) == (3.0, 2.0, 3.0, 1.5)
    ratios = (found.beyond_to_inside, found.beyond_to_late, found.beyond_to_short)
    assert [ratio.mean for ratio in ratios] == [1.0, 1.5, 2.0]
    assert [(bucket.first, bucket.stop) for bucket in found.buckets] == [(0, 16), (16, 32), (32, 64)]
    assert [bucket.loss.mean for bucket in found.buckets] == [3.0, 3.0, 3.0]


def test_intervals_are_over_windows() -> None:
    full = torch.tensor([1.0, 3.0], dtype=F64).unsqueeze(1).expand(2, 32)
    found = summarise(full, full[:, OLD:], OLD)
    # Student's t of two values, 12.706 times the standard error of 1.
    assert found.inside.high - found.inside.mean == pytest.approx(12.706, abs=1e-3)
    assert (found.beyond_to_inside.low, found.beyond_to_inside.high) == (1.0, 1.0)


def test_windows_are_joined_over_batches(model: Transformer) -> None:
    rows = draw_tokens(model.config, 4, 2 * OLD + 1)
    assert loss_by_position(model, [rows[:3], rows[3:]], OLD) == loss_by_position(model, [rows], OLD)
