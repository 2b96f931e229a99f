"""A fault is noticed, and blamed on the rank, the phase and the kind that it was; nothing is left behind.

The truth is what the injector wrote down before it struck.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moe_runtime.train.inject import FAULTS_FILE, read_strikes
from tests.cli.forked_run import Ended, train_under_faults
from tests.cli.small_run import write_config

KINDS = {
    "sigkill": "killed",
    "segfault": "crashed",
    "exit": "exited",
    "raise": "error",
    "oom": "memory",
    "sigstop": "stopped",
    "gil": "silent",
    "sleep": "stuck",
}
QUICK = ("data", "forward", "dispatch", "combine", "backward", "optimizer")
RARE = ("evaluate", "sample", "save")
WRITER = ("save_write", "save_rename")
HANGS = ("sigstop", "gil", "sleep")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two DualPipe ranks whose every phase may take 2 s."""
    limits = {"data": 2, "optimizer": 2, "evaluate": 2, "save": 2, "start": 100, "first_step": 100}
    return write_config(
        tmp_path_factory.mktemp("faults"),
        train__watchdog_s=2,
        train__eval_every=2,
        train__sample_every=2,
        reliability={"heartbeat_s": 0.3, "limits": limits},
    )


def blame(config: Path, folder: Path, fault: str) -> Ended:
    """Let one fault strike a fresh run."""
    ended = train_under_faults(config, folder, 2, "--fresh", "--inject", fault)
    assert ended is not None, (folder / "output").read_text()
    return ended


def wrong(ended: Ended) -> list[str]:
    """What of the blame is not as it was: rank, kind, phase."""
    if len(ended.struck) != 1:
        return ["blamed before the fault struck"]
    (truth,), found = ended.struck, ended.blame
    phase_is = truth["phase"] == found.phase or truth["phase"] == f"save_{found.writes}"
    claims = {
        "rank": found.rank == truth["rank"],
        "kind": found.kind == KINDS[truth["kind"]],
        "phase": phase_is,
    }
    return [claim for claim, holds in claims.items() if not holds]


@pytest.mark.parametrize(
    "fault",
    [
        "sigkill:rank1:step3:dispatch",
        pytest.param("oom:rank0:step3:forward", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_blamed_on_its_rank_phase_and_kind(fault: str, config: Path, tmp_path: Path) -> None:
    ended = blame(config, tmp_path / "ranks", fault)
    assert wrong(ended) == [], (ended.blame, ended.outcome, ended.struck)
    assert ended.blame.step == 3 and ended.noticed_s < 5 * 2
    if fault.startswith("oom"):
        said = ended.outcome.cause
        assert said.startswith("rank 0: memory ended in step 3") and "\n" not in said, said
        assert "asked for 33.0 MiB more; holds weights" in said and "(planned" in said and "; try " in said
        assert ", or " in said.partition("; try ")[2]
        assert set(ended.codes) == {0, 1}  # the other one left by itself


def _all_faults() -> Iterator[str]:
    """Every kind in every phase that it can strike, on the first or the last rank in turn."""
    number = 0
    for kind in KINDS:
        for phase in ("init", *QUICK, *RARE, *(() if kind in ("raise", "oom", "sleep") else WRITER)):
            number += 1
            yield f"{kind}:rank{number % 2}{'' if phase == 'init' else ':step3'}:{phase}"


@pytest.mark.slow
def test_nineteen_of_twenty_faults_are_blamed_on_their_rank_phase_and_kind(
    config: Path, tmp_path: Path
) -> None:
    faults = list(_all_faults())
    found, noticed = {}, {}
    for number, fault in enumerate(faults):
        ended = blame(config, tmp_path / str(number), fault)
        found[fault], noticed[fault] = wrong(ended), ended.noticed_s
    missed = {fault: what for fault, what in found.items() if what}
    print(f"{len(faults)} faults, {len(missed)} wrong: {missed}")
    for kinds in (HANGS, [kind for kind in KINDS if kind not in HANGS]):
        seconds = sorted(seconds for fault, seconds in noticed.items() if fault.split(":")[0] in kinds)
        print(
            f"{'|'.join(kinds)}: noticed after {seconds[len(seconds) // 2]:.2f}, at most {seconds[-1]:.2f} s"
        )
    assert len(missed) <= 0.05 * len(faults), missed
    time.sleep(0.5)
    left = [
        child for child in psutil.Process().children(recursive=True) if "train" in " ".join(child.cmdline())
    ]
    assert left == []


@pytest.mark.slow
def test_a_slow_first_step_save_and_validation_raise_no_alarm(tmp_path: Path) -> None:
    # Limits of phases as they come; the time limit of collectives is that of a default run too.
    changes = {"train__checkpoint_every": 2, "train__eval_every": 2, "train__peer_timeout_s": 600}
    config = write_config(tmp_path, **changes)
    sleeps = ("sleep:rank1:step1:forward:60", "sleep:rank0:step2:save:60", "sleep:rank1:step2:evaluate:30")
    injected = [word for fault in sleeps for word in ("--inject", fault)]
    assert train_under_faults(config, tmp_path / "ranks", 2, *injected) is None
    assert {line["fault"] for line in read_strikes(tmp_path / "runs" / "small" / FAULTS_FILE)} == set(sleeps)
