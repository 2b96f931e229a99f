"""The bound on a MoE layer's memory, measured under a router that sends everything to one rank."""

import threading

import pytest
import torch

from tests.dist.live_bytes import LiveBytes
from tests.dist.round_memory import Measured, Setting, measure_one_piece, measure_rounds
from tests.ranks import run_ranks

BOUND = 1.25
# The ratio of DeepSeek-V3's experts, 2048 / 7168, at an eighth of its widths.
V3_RATIO = {"hidden": 896, "width": 256, "max_rows": 1024}


def _check_bound(measured: list[Measured]) -> None:
    for rank, found in enumerate(measured):
        print(f"rank {rank}: {found.num_rounds} rounds, {found.ratio():.3f} x max_rows x row_bytes; {found}")
    assert len({found.num_rounds for found in measured}) == 1
    assert measured[0].num_rounds > 1
    assert all(found.ratio() <= BOUND for found in measured), measured


@pytest.mark.parametrize(
    ("ranks", "setting"), [(2, Setting()), (4, Setting(kind="two_hop", tokens=512))], ids=["flat", "two hops"]
)
def test_rounds_hold_little_more_than_max_rows_rows(ranks, setting):
    _check_bound(run_ranks(measure_rounds, ranks, setting))


def test_in_one_piece_the_same_layer_exceeds_the_bound_many_times_over():
    flooded = run_ranks(measure_one_piece, 2, Setting())[0]
    assert flooded.ratio() > 10 * BOUND, flooded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "setting"),
    [
        (4, Setting()),
        (2, Setting(**V3_RATIO)),
        (4, Setting(kind="two_hop", tokens=1024, **V3_RATIO)),
        (2, Setting(single_expert=True, max_rows=1024)),
        (2, Setting(single_expert=True, hidden=1024, max_rows=1024)),
        (4, Setting(kind="two_hop", single_expert=True, **V3_RATIO)),
        (2, Setting(dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_the_bound_holds_at_other_shapes_and_dtypes(ranks, setting):
    _check_bound(run_ranks(measure_rounds, ranks, setting, timeout_s=300))


def test_the_meter_sees_what_is_made_and_freed_on_this_thread_and_on_others():
    before = torch.zeros(100)
    ignored = torch.zeros(10)

    def elsewhere() -> None:
        made.append(torch.zeros(50))

    made: list[torch.Tensor] = []
    with LiveBytes([ignored]) as meter:
        temporary = before + 1
        view = temporary[:10] + ignored
        del temporary
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert meter.now == 4 * (100 + 10 + 50), meter.now
    assert meter.peak == 4 * (100 + 100 + 10), meter.peak
    assert view.numel() == 10
