"""Who is named, when, and who never is: heartbeats written by hand, time by hand, stacks of this process."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime.cli.supervise.hang import HangWatch, Verdict, microbatch_of
from moe_runtime.cli.supervise.stacks import only_waits
from moe_runtime.config.reliability import ReliabilityConfig
from moe_runtime.parallel.beat import BeatFile, read_beat
from moe_runtime.parallel.heartbeat import Heartbeat
from moe_runtime.parallel.progress import Progress
from moe_runtime.parallel.starved import own_starvation, starved_s

LIMITS = {"start": 50, "first_step": 40, "data": 6, "optimizer": 8, "evaluate": 30, "save": 60, "end": 70}
PHASES = ("start", "data", "step", "optimizer", "evaluate", "sample", "save", "end")
WATCHDOG_S = 5.0
WAITS = '/torch/distributed/distributed_c10d.py", line 1 in all_reduce'
BUSY = '/moe_runtime/data/loader.py", line 1 in sequences'


class Ranks:
    """Heartbeats of ranks that are one idle process each, at a time that a test sets."""

    def __init__(self, folder: Path, count: int, world_size: int | None = None) -> None:
        self.folder, self.now = folder, 1000.0
        command = [
            sys.executable,
            "-Sc",
            "import sys, signal; signal.signal(10, lambda *_: 0); sys.stdin.read()",
        ]
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
        self.files = [BeatFile(folder / f"rank{rank}.heartbeat") for rank in range(count)]
        self.progress = [Progress() for _ in range(count)]
        self.stacks = [BUSY] * count
        for rank in range(count):
            self.mark(rank)
            self.beat(rank)
            # No thread has number 0: how long real ones are starved does not go with a time set by hand.
            self.files[rank].opens(self.processes[rank].pid, 7, (0, 0))
        pids = {rank: process.pid for rank, process in enumerate(self.processes)}
        reliability = ReliabilityConfig(heartbeat_s=1.0, limits=LIMITS)
        self.watch = HangWatch(folder, pids, reliability, WATCHDOG_S, world_size, now=lambda: self.now)

    def beat(self, rank: int) -> None:
        self.files[rank].beats(self.now)

    def mark(self, rank: int) -> None:
        self.files[rank].marks(self.progress[rank], self.now)

    def goes(self, rank: int, phase: str, step: int = 2, entry: str = "", part: str = "") -> None:
        progress = self.progress[rank]
        progress.step, progress.is_first_step, progress.phase = step, step == 1, phase
        progress.entry, progress.part, progress.count = entry, part, progress.count + 1
        self.mark(rank)

    def passes(self, seconds: float, silent: tuple[int, ...] = ()) -> tuple[Verdict | None, float]:
        """Look four times a second until somebody is named; gives who and after how long."""
        begun = self.now
        while self.now < begun + seconds:
            self.now = round(self.now + 0.25, 6)
            for rank, file in enumerate(self.files):
                if rank not in silent:
                    file.beats(self.now)
                thread = f"Thread 0x{7:016x} (most recent call first):"
                (self.folder / f"rank{rank}.stacks").write_text(f'{thread}\n  File "{self.stacks[rank]}\n')
            verdict = self.watch.look()
            if verdict is not None:
                return verdict, self.now - begun
        return None, self.now - begun

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path, 3)
    yield made
    made.close()


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_has_its_own_limit_and_is_named_within_three_beats_of_it(phase: str, ranks: Ranks) -> None:
    limit = {"step": WATCHDOG_S, "sample": LIMITS["evaluate"]}.get(phase) or LIMITS[phase]
    ranks.stacks = [WAITS, BUSY, WAITS]
    for rank in range(3):
        ranks.goes(rank, phase, step=0 if phase == "start" else 2)
    verdict, seconds = ranks.passes(limit + 10)
    assert verdict is not None and limit < seconds <= limit + 3
    assert (verdict.rank, verdict.kind, verdict.phase) == (1, "stuck", phase)


def test_a_slow_first_step_save_and_validation_raise_no_alarm(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.watch = HangWatch(
        tmp_path, ranks.watch.pids, ReliabilityConfig(), 60.0, now=lambda: ranks.now
    )  # as they come, without a config
    try:
        for phase, step, seconds in (("step", 1, 61), ("save", 2, 61), ("evaluate", 2, 31), ("save", 3, 120)):
            for rank, stack in enumerate((BUSY, WAITS)):
                ranks.stacks[rank] = stack
                ranks.goes(rank, phase, step)
            silent = (0,) if step == 1 else ()  # kernels are compiled under the interpreter's lock
            assert ranks.passes(seconds, silent) == (None, pytest.approx(seconds)), phase
    finally:
        ranks.close()


def test_a_locked_interpreter_is_named_by_its_silence(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.goes(rank, "step", entry="1F3", part="dispatch layers.2")
    verdict, seconds = ranks.passes(10, silent=(2,))
    assert verdict is not None and 2 <= seconds <= 3
    assert (verdict.rank, verdict.kind, verdict.microbatch, verdict.step) == (2, "silent", 3, 2)
    expected = "rank 2 makes no progress: step 2, step, 1F3, dispatch layers.2, for 2 s; silent"
    assert verdict.text.startswith(expected)


def test_a_stopped_process_is_named_before_those_that_wait_for_it(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.goes(rank, "step")
    ranks.processes[1].send_signal(19)
    while ranks.watch._status(1) != "stopped":
        time.sleep(0.01)
    verdict, seconds = ranks.passes(10, silent=(1,))
    assert verdict is not None and (verdict.rank, verdict.kind) == (1, "stopped") and seconds <= 3


def test_of_several_that_are_stuck_the_first_is_named_and_marks_end_suspicion(ranks: Ranks) -> None:
    for rank in (2, 0, 1):
        ranks.goes(rank, "step")
        ranks.now += 0.5
    assert ranks.passes(3)[0] is None
    ranks.goes(2, "step")  # goes on in time
    verdict, _ = ranks.passes(10)
    assert verdict is not None and verdict.rank == 0


def test_ranks_that_only_wait_are_not_named_while_one_works_within_its_limit(ranks: Ranks) -> None:
    ranks.stacks = [WAITS, WAITS, BUSY]
    for rank, phase in enumerate(("step", "step", "save")):
        ranks.goes(rank, phase)
    verdict, seconds = ranks.passes(100)
    assert verdict is not None and (verdict.rank, verdict.phase) == (2, "save") and seconds > LIMITS["save"]


def test_where_all_wait_it_is_a_deadlock_or_the_other_machines_business(tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "other").mkdir()
    elsewhere = Ranks(tmp_path / "other", 2, world_size=4)
    try:
        for world in (ranks, elsewhere):
            world.stacks = [WAITS] * len(world.files)
            for rank in range(len(world.files)):
                world.goes(rank, "step")
        verdict, seconds = ranks.passes(30)
        assert verdict is not None and verdict.kind == "deadlock"
        assert 2 * WATCHDOG_S <= seconds <= 2 * WATCHDOG_S + 3
        assert elsewhere.passes(100)[0] is None
    finally:
        elsewhere.close()


def test_a_watch_that_stood_still_itself_gives_the_ranks_time(ranks: Ranks) -> None:
    for rank in range(3):
        ranks.goes(rank, "step")
    ranks.passes(1)
    ranks.now += 100  # a machine that slept; monotonic time may or may not count that
    assert ranks.watch.look() is None
    for rank in range(3):
        ranks.goes(rank, "step")
    assert ranks.passes(4)[0] is None


def test_the_microbatch_is_that_of_the_part() -> None:
    assert microbatch_of("3F5, attend layers.1") == 5
    assert microbatch_of("3F5+4B1', attend layers.1") == 5
    assert microbatch_of("3F5+4B1', combine_b layers.1") == 1
    assert microbatch_of("0W12") == 12 and microbatch_of("") is None


def test_stacks_tell_who_waits() -> None:
    def block(ident: int, *files: str) -> str:
        frames = "".join(f'  File "{file}", line 3 in f\n' for file in files)
        return f"Thread 0x{ident:016x} (most recent call first):\n{frames}"

    library = "/usr/lib/python3.11/threading.py"
    own = block(5, library, "/x/comm/moe_comm/lane.py", "/x/moe_runtime/train/loop.py")
    sleeps = block(5, "/x/moe_runtime/train/inject.py", "/x/moe_runtime/parallel/p2p.py")
    other = block(6, "/usr/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py")
    assert only_waits(f"{other}\n{own}", 5)
    assert not only_waits(f"{other}\n{sleeps}", 5)
    assert only_waits(f"{sleeps}\n{other}".replace("Thread 0x", "Current thread 0x"), 6)
    writer = "/x/moe_runtime/checkpoint/background.py"
    saves = block(5, library, writer, "/x/moe_runtime/train/checkpoints.py", "/x/moe_runtime/train/loop.py")
    assert only_waits(f"{block(6, '/x/moe_runtime/parallel/peers.py', writer, library)}\n{saves}", 5)
    assert not only_waits(f"{block(6, '/x/moe_runtime/checkpoint/disk.py', writer, library)}\n{saves}", 5)
    assert not only_waits("", 5) and not only_waits(block(5, library), 5)


def test_a_heartbeat_shows_every_mark_at_once_and_beats(tmp_path: Path) -> None:
    progress = Progress()
    assert read_beat(tmp_path / "rank3.heartbeat") is None
    with Heartbeat(tmp_path, 3, 0.05) as heartbeat:
        heartbeat.follow(progress)
        progress.begins_step(4)
        progress.enters("step")
        progress.runs("3F5+4B1'")
        progress.begins("dispatch layers.3")
        first = read_beat(tmp_path / "rank3.heartbeat")
        assert first is not None and first.action == "3F5+4B1', dispatch layers.3"
        assert (first.pid, first.thread, first.step, first.phase) == (
            os.getpid(),
            threading.get_ident(),
            4,
            "step",
        )
        assert first.count == progress.count and abs(first.marked_s - time.monotonic()) < 1
        until = time.monotonic() + 5
        while (beat := read_beat(tmp_path / "rank3.heartbeat")) and beat.beaten_s == first.beaten_s:
            assert time.monotonic() < until
        assert beat is not None and beat.count == first.count


def test_a_thread_sees_its_own_starvation_as_others_see_it() -> None:
    own = own_starvation(ranks_per_node=10**6)
    before = own()
    seen = starved_s(os.getpid(), [threading.get_native_id()])
    assert 0 <= before <= seen <= own()
    assert own_starvation(ranks_per_node=1)() == 0.0 and starved_s(os.getpid(), [0]) == 0.0
