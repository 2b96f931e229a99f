"""What a run went through, from its events: restarts, lost steps, checkpoints, time that counts."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from moe_runtime.metrics import ledger
from moe_runtime.metrics.ledger import Ledger

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Clocks:
    """Both clocks of the ledger, at a time of the test's."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now + 5000.0

    def time(self) -> float:
        return BEGIN.timestamp() + self.now


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(ledger, "time", clocks)
    return clocks


def event(second: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": (BEGIN + timedelta(seconds=second)).isoformat(), "kind": kind, **fields}


def begins(book: Ledger, second: float, step: int, attempt: int) -> dict[str, Any]:
    """The event of an attempt, as the recorder writes it."""
    said = event(
        second, "attempt", step=step, attempt=attempt, lost_steps=book.lost_steps_now, run_s=book.run_s
    )
    book.add(said)
    return said


def done(step: int, step_s: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "step_s": step_s, "skipped": False, **more}


def test_a_run_without_trouble_counts_its_steps_against_its_time(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1)
    begins(book, 0, 0, 1)
    for step in (1, 2, 3, 4):
        clocks.now += 1.25
        found = book.step(done(step))
    assert (found["train_s"], found["run_s"], found["ettr"]) == (4.0, 5.0, 0.8)
    assert (found["restarts"], found["lost_steps"], found["digest_mismatches"]) == (0, 0, 0)
    assert all(found[key] is None for key in ("mttr_s", "checkpoint_age", "verified_step", "checkpoint_s"))


def test_a_step_that_was_skipped_takes_time_and_counts_for_nothing(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1)
    clocks.now += 2.0
    assert book.step(done(1) | {"skipped": True})["ettr"] == 0.0


def test_a_restart_costs_its_time_the_steps_since_the_checkpoint_and_is_told_once(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1)
    events = [begins(book, 0, 0, 1)]
    for step in range(1, 8):
        clocks.now += 1.0
        line = done(step) | book.step(done(step))
        if step == 4:
            kept = line
            events.append(event(clocks.now, "checkpoint", step=4, blocked_s=0.1, write_s=0.4))
            book.add(events[-1])
    assert (line["checkpoint_age"], line["checkpoint_s"], line["checkpoint_blocked_s"]) == (3, 0.5, 0.1)
    events += [event(9.0, "fault", attempt=1, step=7), event(9.0, "restart", attempt=2)]

    clocks.now = 14.0
    again = Ledger(events, line, kept, 4, 2)
    events.append(begins(again, 14.0, 4, 2))
    clocks.now = 16.0
    assert again.repaired_after() == pytest.approx(7.0) and again.repaired_after() is None
    again.add(event(16.0, "recovered", step=5, seconds=7.0))
    found = again.step(done(5))
    assert (found["restarts"], found["lost_steps"], found["mttr_s"]) == (1, 3, 7.0)
    assert (found["train_s"], found["run_s"]) == (5.0, pytest.approx(16.0))
    assert (found["checkpoint_age"], found["verified_step"]) == (1, 4)


def test_the_time_in_which_no_launcher_was_at_work_is_left_out(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1)
    events = [begins(book, 0, 0, 1)]
    clocks.now = 2.0
    line = done(1) | book.step(done(1))
    events += [event(2.0, "checkpoint", step=1, blocked_s=0.0, write_s=0.1), event(2.0, "stopped", step=1)]
    clocks.now = 90_000.0
    later = Ledger(events, line, line, 1, 1)
    begins(later, 90_000.0, 1, 1)
    clocks.now += 3.0
    found = later.step(done(2))
    assert (found["run_s"], found["train_s"]) == (pytest.approx(5.0), 2.0)
    assert later.repaired_after() is None and found["restarts"] == 0


def test_a_run_that_begins_anew_knows_nothing_of_the_one_before(clocks: Clocks) -> None:
    events = [
        event(0, "attempt", step=0, attempt=1),
        event(1, "corruption", step=1),
        event(2, "fault", step=3),
        event(3, "attempt", step=0, attempt=2, lost_steps=3),
        event(5, "checkpoint", step=8, blocked_s=0.0, write_s=0.1),
    ]
    old = done(9) | {"run_s": 8.0, "train_s": 7.0}
    book = Ledger(events, old, None, 0, 1)
    begins(book, 9.0, 0, 1)
    clocks.now += 1.0
    found = book.step(done(1))
    assert (found["restarts"], found["lost_steps"], found["digest_mismatches"]) == (0, 0, 0)
    assert found["verified_step"] is None and (found["run_s"], found["train_s"]) == (1.0, 1.0)


def test_a_roll_back_loses_steps_and_their_time(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1)
    lines = []
    for step in range(1, 6):
        clocks.now += 1.0
        lines.append(done(step) | book.step(done(step)))
    book.roll_back(lines[1])
    book.add(event(5.0, "roll_back", step=5, to_step=2))
    clocks.now += 1.0
    found = book.step(done(3))
    assert (found["lost_steps"], found["train_s"], found["run_s"]) == (3, 3.0, 6.0)


def test_events_of_older_versions_are_read(clocks: Clocks) -> None:
    events = [event(0, "attempt", step=0), event(1, "attempt", step=4), event(2, "spike", z=9.0)]
    events += [{"kind": 3}, {"kind": "fault", "time": "noon"}, {"kind": "roll_back"}, {}]
    found = Ledger(events, {"step": 6}, {"step": 4}, 4, 1).step(done(5))
    assert found["train_s"] == 1.0 and found["verified_step"] == 4


def test_loading_libraries_and_building_the_model_is_no_training(clocks: Clocks) -> None:
    book = Ledger([], None, None, 0, 1, lived_s=9.0)
    begins(book, 9.0, 0, 1)
    clocks.now += 1.0
    found = book.step(done(1))
    assert (found["run_s"], found["train_s"], found["ettr"]) == (10.0, 1.0, 0.1)
    again = Ledger([event(9.0, "attempt", step=0)], found, found, 1, 1, lived_s=4.0)
    clocks.now += 1.0
    assert again.step(done(2))["run_s"] == 15.0
