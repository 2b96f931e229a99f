"""Two network namespaces as two machines: killed, brought back, cut off, healed, slow, lossy, never back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_runtime.cli.testbed import links
from moe_runtime.errors import ConfigError
from tests.cli import far_link
from tests.cli.small_run import ROOT, digests, run, steps_done, write_config
from tests.cli.two_machines import two_machines

pytestmark = [pytest.mark.launcher, pytest.mark.slow]

_PORT = 29_517
_LAYOUT = {"pp": 1, "dp": 2, "ep": 1}
# With FP8 moments a change of layout moves the blocks that share a scale, which costs more than 1e-5.
_EXACT = {"moments": "fp32", "peak_lr": 1e-3}
_STEPS = 8


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    try:
        links.require_tools()
    except ConfigError as error:
        pytest.skip(str(error))


def _losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def _clean(folder: Path, steps: int) -> Path:
    """The same run on one machine, undisturbed."""
    folder.mkdir()
    changes = {"layout": _LAYOUT, "optim": _EXACT, "train__eval_every": 0}
    config = write_config(folder, train__checkpoint_every=0, **changes)
    code, output = run("train", str(config), f"train.total_steps={steps}")
    assert code == 0, output
    return folder / "runs" / "small"


def test_machines_that_die_are_cut_off_and_come_back_cost_nothing_but_time(tmp_path: Path) -> None:
    changes = {"layout": _LAYOUT, "optim": _EXACT, "train__eval_every": 0}
    config = write_config(tmp_path, train__checkpoint_every=1, **changes)
    command = ["train", str(config), "train.total_steps=100000", "reliability.rejoin_s=3"]
    options = ["--nnodes", "1:2", "--master", f"10.83.0.1:{_PORT}"]
    took: dict[str, float] = {}
    with (
        links.open_testbed(2, None) as testbed,
        two_machines(testbed, tmp_path, command, options) as machines,
    ):
        machines.goes_on(1)
        machines.kill(1)
        took["killed: fault told"] = machines.wait(lambda: machines.events("fault"), "the fault")
        took["killed: shrunk"] = machines.wait(lambda: machines.events("shrink"), "the shrink")
        took["killed: goes on"] = machines.goes_on(2)
        machines.start(1)
        took["back: grown"] = machines.wait(lambda: machines.events("grow"), "the growth")
        took["back: goes on"] = machines.goes_on(3)
        machines.link(1, "down")
        took["cut: shrunk"] = machines.wait(lambda: len(machines.events("shrink")) == 2, "the second shrink")
        took["cut: goes on"] = machines.goes_on(4)
        machines.link(1, "up")
        took["healed: grown"] = machines.wait(lambda: len(machines.events("grow")) == 2, "the second growth")
        took["healed: goes on"] = machines.goes_on(5)
        testbed.limit(10)
        took["10 Mbit/s: a step"] = machines.goes_on(5, steps=4)
        assert machines.stop() == [0, 0], machines.logs()
        grown = [event for event in machines.events("attempt") if event["attempt"] in (3, 5)]
    print({what: round(seconds, 1) for what, seconds in took.items()})
    done = steps_done(machines.run_dir)
    assert done == list(range(1, len(done) + 1))
    assert len(grown) == 2
    clean = _losses(_clean(tmp_path / "clean", done[-1]))
    # Sums over replicas are in another order while one is away, so not the same bits.
    assert _losses(machines.run_dir) == pytest.approx(clean, rel=1e-5)


@contextmanager
def _far(testbed: links.Testbed, delay_ms: float, loss: float) -> Iterator[None]:
    holders = [str(holder) for holder in testbed.holders]
    command = [sys.executable, "-m", "tests.cli.far_link", *holders, str(delay_ms), str(loss)]
    pipe = subprocess.PIPE
    relay = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdin=pipe, stdout=pipe, text=True)
    assert relay.stdin is not None and relay.stdout is not None
    try:
        assert relay.stdout.readline() == "up\n"
        yield
    finally:
        relay.stdin.close()
        relay.wait(10)
        relay.stdout.close()


@pytest.fixture(scope="module")
def clean_digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(_clean(tmp_path_factory.mktemp("far") / "clean", _STEPS), _STEPS)


@pytest.mark.parametrize(("delay_ms", "loss"), [(1, 0), (5, 0), (20, 0), (1, 0.001), (1, 0.01)])
def test_a_slow_or_lossy_link_changes_the_time_and_not_one_bit(
    delay_ms: float, loss: float, tmp_path: Path, clean_digests: dict[str, str]
) -> None:
    changes = {"layout": _LAYOUT, "optim": _EXACT, "train__eval_every": 0}
    config = write_config(tmp_path, train__checkpoint_every=0, **changes)
    command = ["train", str(config), f"train.total_steps={_STEPS}"]
    options = ["--nnodes", "2", "--master", f"{far_link.address(0)}:{_PORT}"]
    with (
        links.open_testbed(2, None) as testbed,
        _far(testbed, delay_ms, loss),
        two_machines(testbed, tmp_path, command, options) as machines,
    ):
        assert machines.ends() == [0, 0], machines.logs()
    assert digests(machines.run_dir, _STEPS) == clean_digests
