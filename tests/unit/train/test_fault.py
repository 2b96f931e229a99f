"""Faults as they are written, and where a rank's marks let them strike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.progress import Progress
from moe_runtime.train.fault import KINDS, PHASES, Fault, read_faults, split_orders
from moe_runtime.train.inject import FAULTS_FILE, InjectedFault, Injector, phases_of, read_strikes


def test_every_kind_is_read_with_all_its_parts() -> None:
    texts = [
        "sigkill:rank1:step5:dispatch",
        "sleep:rank0:step3:data:0.5",
        "gil:rank2:init",
        "slow:rank3:step9:1.5",
    ]
    texts += ["nan:rank1:step7", "flip:rank1:step7:optimizer:2", "sigkill:rank1:step5:dispatch"]
    got = read_faults(texts, 4)
    assert got[0] == Fault(texts[0], 0, "sigkill", 1, 5, "dispatch", "", 0.0)
    assert (got[1].phase, got[1].value, got[1].times) == ("data", 0.5, 1)
    assert (got[2].step, got[2].phase) == (0, "init")
    assert (got[3].phase, got[3].value) == ("forward", 1.5)
    assert (got[4].phase, got[4].target, got[4].times) == ("optimizer", "grad", 1)
    assert (got[5].phase, got[5].target, got[5].times) == ("data", "optimizer", 2)
    assert got[6].nth == 1 and got[6] != got[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigkil:rank1:step5:data", "expected one of sigkill"),
        ("sigkill", "expected rank and its number, such as rank1, got nothing"),
        ("sigkill:1:step5:data", "expected rank and its number"),
        ("sigkill:rank1:5:data", "expected step and its number, such as step1, got 5"),
        ("sigkill:rank1:step5", "expected after step5 one of data"),
        ("sigkill:rank1:step5:dispach", "got dispach"),
        ("sigkill:rank1:step0:data", "expected after step0 one of init"),
        ("nan:rank1:step0", "expected after step0 one of a step from 1"),
        ("sigkill:rank1:step5:data:3", "expected no more words, got 3"),
        ("sleep:rank1:step5:data:long", "expected seconds, a number from 0, got long"),
        ("sleep:rank1:step5:data:nan", "expected seconds"),
        ("slow:rank1:step5:0.5", "expected factor, a number from 1, got 0.5"),
        ("flip:rank1:step5:weights", "expected after step5 one of param, grad, optimizer, got weights"),
        ("sigkill:rank4:step5:data", "expected a rank below 4, got 4"),
    ],
)
def test_a_mistake_says_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_faults([text], 4)
    assert str(caught.value).startswith(f"--inject {text}: expected") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_phase_of_every_kind_is_understood() -> None:
    for name, kind in KINDS.items():
        for place in kind.places:
            step = "" if place == "init" else ":step2"
            (fault,) = read_faults([f"{name}:rank0{step}:{place}"])
            assert fault.kind == name and fault.phase in PHASES


def walk(progress: Progress, step: int) -> None:
    """The marks of a step of a rank with one stage, and of what follows it."""
    progress.begins_step(step)
    progress.enters("step")
    for entry, parts in (("0F0", ("attend", "dispatch", "combine")), ("0F1+0B0", ("attend", "combine_b"))):
        progress.runs(entry)
        for part in parts:
            progress.begins(f"{part} layers.1")
    progress.runs("0W0")
    progress.runs("")
    for phase in ("optimizer", "evaluate", "save"):
        progress.enters(phase)


def test_each_mark_begins_the_phases_that_it_should() -> None:
    progress, seen = Progress(), []
    progress.listeners.append(lambda mark: seen.append(phases_of(mark)))
    walk(progress, 1)
    forward, backward = ("forward",), ("backward",)
    expected = [("data",), (), (), forward, ("forward", "dispatch"), ("forward", "combine")]
    expected += [(), forward, backward, backward, (), ("optimizer",), ("evaluate",), ("save",)]
    assert seen == expected


def injector(
    folder: Path, *texts: str, rank: int = 0, fresh: bool = False
) -> tuple[Injector, Progress, list]:
    made, progress, struck = Injector(read_faults(texts), rank, folder, fresh), Progress(), []
    made.listen(
        progress, lambda fault: struck.append((progress.step, progress.phase, fault.kind, fault.target))
    )
    return made, progress, struck


def test_a_fault_strikes_once_and_is_on_the_disk_before(tmp_path: Path) -> None:
    made, progress, _ = injector(tmp_path, "raise:rank0:step2:dispatch", "raise:rank1:step1:data")
    walk(progress, 1)
    with pytest.raises(InjectedFault, match="raise:rank0:step2:dispatch"):
        walk(progress, 2)
    (line,) = [json.loads(line) for line in (tmp_path / FAULTS_FILE).read_text().splitlines()]
    assert (line["kind"], line["rank"], line["step"], line["phase"]) == ("raise", 0, 2, "dispatch")
    assert (line["entry"], line["part"], line["pid"]) == ("0F0", "dispatch layers.1", os.getpid())
    assert made.left() == []
    _, again, _ = injector(tmp_path, "raise:rank0:step2:dispatch")  # the restarted rank
    walk(again, 2)


def test_equal_faults_strike_each_and_a_new_life_of_the_folder_begins_anew(tmp_path: Path) -> None:
    text = "raise:rank0:step2:data"
    for _ in range(2):
        _, progress, _ = injector(tmp_path, text, text)
        with pytest.raises(InjectedFault):
            walk(progress, 2)
    made, progress, _ = injector(tmp_path, text, text)
    walk(progress, 2)
    assert made.left() == []
    assert len(read_strikes(tmp_path / FAULTS_FILE)) == 2
    injector(tmp_path, "raise:rank1:step2:data", rank=1, fresh=True)
    assert len(read_strikes(tmp_path / FAULTS_FILE)) == 2  # of rank 0
    assert injector(tmp_path, text, text, fresh=True)[0].left() == [text, text]
    assert read_strikes(tmp_path / FAULTS_FILE) == []


def test_numbers_are_struck_as_often_as_asked_for(tmp_path: Path) -> None:
    made, progress, struck = injector(tmp_path, "nan:rank0:step2:grad:2", "flip:rank0:step3:param")
    for step in (1, 2):
        walk(progress, step)
    assert made.left() == ["nan:rank0:step2:grad:2", "flip:rank0:step3:param"]
    for step in (3, 4):
        walk(progress, step)
    nan = [(step, "optimizer", "nan", "grad") for step in (2, 3)]
    assert struck == [nan[0], (3, "data", "flip", "param"), nan[1]]


def test_a_rare_phase_is_waited_for(tmp_path: Path) -> None:
    made, progress, _ = injector(tmp_path, "diskfull:rank0:step2", "raise:rank0:step3:save_rename")
    walk(progress, 1)
    made.at("save_write")
    walk(progress, 4)
    with pytest.raises(OSError, match="No space left"):
        made.at("save_write")
    with pytest.raises(InjectedFault):
        made.at("save_rename")


def test_a_slow_rank_takes_longer_for_its_own_work_only(tmp_path: Path) -> None:
    _, progress, _ = injector(tmp_path, "slow:rank0:step1:3")
    progress.begins_step(1)
    progress.enters("step")
    progress.begins("attend layers.0")
    begun = time.thread_time()
    while time.thread_time() - begun < 0.05:
        pass
    before = time.perf_counter()
    progress.begins("attend layers.1")
    lag_s = time.perf_counter() - before
    time.sleep(0.2)  # waits for others
    before = time.perf_counter()
    progress.begins("attend layers.2")
    assert 0.1 <= lag_s < 0.5 and time.perf_counter() - before < 0.1


DOES = """
import signal, sys, threading
from pathlib import Path
from moe_runtime.parallel.progress import Progress
from moe_runtime.train.fault import read_faults
from moe_runtime.train.inject import Injector
signal.signal(signal.SIGUSR2, lambda *_: print("handled", flush=True))
threading.Thread(target=lambda: [print("alive", flush=True) for _ in sys.stdin], daemon=True).start()
progress = Progress()
Injector(read_faults([sys.argv[1]]), 0, Path(sys.argv[2])).listen(progress, None)
print("ready", flush=True)
progress.begins_step(1)
print("passed", flush=True)
"""


def _does(text: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", DOES, text, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("sigkill", -signal.SIGKILL),
        ("sigterm", -signal.SIGTERM),
        ("segfault", -signal.SIGSEGV),
        ("exit", 1),
        ("raise", 1),
        ("oom", 1),
    ],
)
def test_a_deed_ends_the_process_as_it_should(kind: str, code: int, tmp_path: Path) -> None:
    process = _does(f"{kind}:rank0:step1:data", tmp_path)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == code and said == "", complaint
    if kind == "oom":
        assert "can't allocate memory" in complaint


def test_a_held_lock_stops_threads_and_handlers_and_a_sleep_stops_neither(tmp_path: Path) -> None:
    for kind, answers in (("gil", False), ("sleep", True)):
        process = _does(f"{kind}:rank0:step1:data", tmp_path)
        while kind not in (tmp_path / FAULTS_FILE).read_text() if (tmp_path / FAULTS_FILE).exists() else True:
            time.sleep(0.01)
        time.sleep(0.1)
        lines: list[str] = []
        reader = threading.Thread(target=lambda out=process.stdout, into=lines: into.extend(out), daemon=True)
        reader.start()
        process.stdin.write("\n")
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        said = "".join(lines)  # thread and handler may write into each other's line
        assert ("alive" in said, "handled" in said) == (answers, answers), kind
        process.kill()
        process.wait()


def test_a_stopped_process_is_stopped(tmp_path: Path) -> None:
    process = _does("sigstop:rank0:step1:data", tmp_path)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "passed\n"


def test_all_ranks_take_part_in_a_fault_of_what_is_alike_on_them(tmp_path: Path) -> None:
    text = "dead_expert:rank1:step2"
    for rank in (0, 1):
        made, progress, struck = injector(tmp_path, text, "saturate:rank1:step2", rank=rank)
        walk(progress, 1)
        walk(progress, 2)
        walk(progress, 3)
        wanted = [(2, "data", "dead_expert", "bias"), (2, "data", "saturate", "casts")]
        assert struck == wanted[: rank + 1] and made.left() == []
    assert [line["rank"] for line in read_strikes(tmp_path / FAULTS_FILE)] == [1, 1]


def test_a_bias_runs_away_over_as_many_steps_as_asked_for(tmp_path: Path) -> None:
    _, progress, struck = injector(tmp_path, "bias_runaway:rank0:step2:3")
    for step in range(1, 8):
        walk(progress, step)
    assert [step for step, *_ in struck] == [2, 3, 4]


def test_orders_are_read_while_the_run_goes_on_and_strike_once(tmp_path: Path) -> None:
    orders, progress = tmp_path / "orders", Progress()
    injector = Injector([], 0, tmp_path, orders=orders)
    injector.listen(progress, None)
    progress.begins_step(1)
    orders.write_text("raise:rank0:step2:optimizer\nraise:rank1:step2:optimizer\n")
    progress.enters("optimizer")
    progress.begins_step(2)
    with pytest.raises(InjectedFault):
        progress.enters("optimizer")
    again = Injector([], 0, tmp_path, orders=orders)
    again.listen(fresh := Progress(), None)
    fresh.begins_step(2)
    fresh.enters("optimizer")
    assert again.left() == []


def test_orders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="expected a file with a fault on each line"):
            split_orders([f"@{place}"])
    with pytest.raises(ConfigError, match="expected one @FILE, got 2"):
        split_orders(["@a", "@b"])
