"""Which losses stand out, and what of them a checkpoint keeps."""

import json
import random
from typing import Any

import pytest

from moe_runtime.errors import NumericsError
from moe_runtime.metrics.recorder import Tell
from moe_runtime.train.guard.guard import Guard
from moe_runtime.train.guard.spike import robust_z
from moe_runtime.train.guard.state import GuardState
from tests.unit.config.samples import build

WINDOW = 32


Events = list[dict[str, Any]]


def into(events: Events) -> Tell:
    def tell(kind: str, step: int, message: str, **fields: Any) -> None:
        events.append({"kind": kind, "step": step, "message": message, **fields})

    return tell


def judged(losses: list[float], state: GuardState, **config: Any) -> tuple[list[int], Events]:
    """Steps that would roll back, and all events."""
    events: Events = []
    guard = Guard(build(guard={"spike_z": 8.0, **config}), state, into(events))
    found = []
    for step, loss in enumerate(losses, start=1):
        record = {"step": step, "loss": loss, "skipped": False, "grad_norm": 1.0}
        if guard.finds_spike(record, []):
            found.append(step)
    return found, events


def noisy(steps: int) -> list[float]:
    rng = random.Random(5)
    return [5.0 - 0.002 * step + rng.gauss(0.0, 0.03) for step in range(steps)]


def test_a_steady_run_has_no_spike_and_a_jump_is_one() -> None:
    losses = noisy(500)
    assert judged(losses, GuardState(WINDOW), spike_action="roll_back")[1] == []
    losses[300] += 1.0
    found, events = judged(losses, GuardState(WINDOW), spike_action="roll_back")
    assert found == [301] and [event["kind"] for event in events] == ["spike"]


def test_a_spike_does_not_hide_the_next_one() -> None:
    losses = noisy(200)
    losses[100] += 1.0
    losses[101] += 1.0
    assert judged(losses, GuardState(WINDOW), spike_action="roll_back")[0] == [101, 102]


def test_the_action_and_the_number_of_roll_backs_decide() -> None:
    losses = noisy(200)
    losses[100] += 1.0
    assert judged(losses, GuardState(WINDOW), spike_action="log")[0] == []
    used_up = GuardState(WINDOW)
    used_up.roll_backs = 3
    found, events = judged(losses, used_up, spike_action="roll_back")
    assert found == [] and len(events) == 1


def test_a_resumed_run_judges_as_if_it_had_never_stopped() -> None:
    losses = noisy(200)
    losses[120] += 0.35
    state = GuardState(WINDOW)
    first, _ = judged(losses[:110], state, spike_action="roll_back")
    resumed = GuardState(WINDOW)
    resumed.restore(json.loads(json.dumps(state.to_json())), (), position=0)
    later, events = judged(losses[110:], resumed, spike_action="roll_back")
    assert first == [] and later == [11]
    whole, all_events = judged(losses, GuardState(WINDOW), spike_action="roll_back")
    assert whole == [121] and all_events[0]["z"] == events[0]["z"]


def test_losses_that_are_all_but_equal_make_no_spike_of_noise() -> None:
    assert robust_z([2.0] * 64, 2.001) < 1.0
    assert robust_z([2.0] * 64, 2.5) > 100.0


def test_a_skip_in_between_starts_the_count_of_skips_anew() -> None:
    state = GuardState(WINDOW)
    guard = Guard(
        build(guard={"max_skips": 3}, train={"total_steps": 9, "skip_updates": [7]}), state, into([])
    )

    def step(number: int, skipped: bool) -> None:
        norm = float("nan") if skipped else 1.0
        guard.finds_spike({"step": number, "loss": norm, "skipped": skipped, "grad_norm": norm}, [])

    for number, skipped in enumerate((True, True, False, True, True), start=1):
        step(number, skipped)
    guard.finds_spike({"step": 7, "loss": 1.0, "skipped": True, "grad_norm": 1.0}, [])  # left out on purpose
    assert state.skips_in_row == 2 and list(state.losses) == [1.0]
    with pytest.raises(NumericsError, match=r"guard.max_skips: 3 steps in a row"):
        step(8, skipped=True)


def test_ranges_of_the_config_that_come_too_late_are_left_out() -> None:
    state = GuardState(WINDOW, skip=[(10, 5), (40, 5)])
    state.restore({}, [(20, 5)], position=30)
    assert state.skipped_data.ranges == ((20, 5), (40, 5))
    state.restore({}, (), position=0)
    assert state.skipped_data.ranges == ((10, 5), (40, 5))
