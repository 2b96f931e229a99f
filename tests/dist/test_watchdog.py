"""A rank that fails names its action; one that is stuck has every rank's action told, within the limit."""

import os
import signal
import time

import pytest

from moe_runtime.parallel.watchdog import Watchdog
from moe_runtime.parallel.world import shared_store
from tests.dist.layout_case import Case, batch, build, run_lane
from tests.ranks import run_ranks

LIMIT_S = 3.0
CASE = Case("dualpipe", {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}, 4)


def _stuck_in_an_exchange(rank: int, world_size: int) -> list[tuple[str, float]]:
    """Rank 3 sleeps in the experts of a second microbatch; the others wait for it."""
    runtime = build(CASE, rank)
    said: list[tuple[str, float]] = []
    begun = time.monotonic()

    def say(text: str) -> None:
        said.append((text, time.monotonic() - begun))

    calls = 0
    sleeps_in = runtime.chunks[1].layers["3"].moe.experts

    def slow(*args: object) -> None:
        nonlocal calls
        calls += 1
        if rank == 3 and calls == 2:
            time.sleep(2 * LIMIT_S)

    sleeps_in.register_forward_pre_hook(slow)
    place = f"pp {runtime.mesh.pp_rank}, dp {runtime.mesh.dp_rank}"
    with Watchdog(shared_store(), runtime.clock, rank, world_size, place, LIMIT_S, say):
        run_lane(runtime, batch(runtime.config))
    return said


def test_a_stuck_rank_has_the_actions_of_all_ranks_told_within_the_limit() -> None:
    found = run_ranks(_stuck_in_an_exchange, 4)
    reports = [report for said in found for report in said]
    assert len(reports) == 1, reports
    ((text, seconds),) = reports
    lines = text.splitlines()
    assert "no progress on rank" in lines[0] and len(lines) == 5
    assert "rank 3 (pp 1, dp 1):" in lines[4] and "experts layers.3" in lines[4], text
    assert "rank 2 (pp 1, dp 0):" in lines[3] and "layers.3" in lines[3], text  # waits for rank 3's rows
    for line in lines[1:3]:  # the other pipeline rank waits for what these two have to send
        assert "waits for" in line or "experts" in line, text
    assert seconds < 2 * LIMIT_S, seconds


def _stopped(rank: int, world_size: int) -> list[str]:
    """Rank 1 is stopped by a signal in the middle of a step; another process wakes it up again."""
    runtime = build(Case("1f1b", {"pp": 2, "schedule": "1f1b"}, 4), rank)
    said: list[str] = []

    def stop(*args: object) -> None:
        if rank == 1 and not said:
            said.append("")
            time.sleep(LIMIT_S / 3)  # long enough to have said something
            if os.fork() == 0:
                time.sleep(2 * LIMIT_S)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)

    runtime.chunks[rank].layers[str(2 * rank)].attn.register_forward_pre_hook(stop)
    with Watchdog(shared_store(), runtime.clock, rank, world_size, f"pp {rank}", LIMIT_S, said.append):
        run_lane(runtime, batch(runtime.config))
    return said


@pytest.mark.slow
def test_a_rank_that_says_nothing_any_more_is_named() -> None:
    text = run_ranks(_stopped, 2)[0][0]
    assert "rank 1 (pp 1): no word for" in text and "stopped or gone" in text, text
    assert "rank 0 (pp 0):" in text and "waits for" in text, text


def _fails(rank: int, world_size: int) -> None:
    runtime = build(Case("zbv", {"pp": 2, "schedule": "zbv"}, 4), rank)

    def fail(*args: object) -> None:
        raise FloatingPointError("made to fail")

    if rank == 1:
        runtime.chunks[2].layers["2"].moe.experts.register_forward_pre_hook(fail)
    run_lane(runtime, batch(runtime.config))


def test_a_failing_rank_names_rank_position_action_and_phase() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(_fails, 2)
    expected = "pipeline rank 1, position 3, 2F0, experts layers.2: FloatingPointError: made to fail"
    assert f"ActionFailed: {expected}" in str(caught.value)
