"""`moe-runtime bench pipeline`: figures from what ranks say, calibration, and small real runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from moe_runtime.cli.bench_pipeline.calibrate import Step, calibrate
from moe_runtime.cli.bench_pipeline.exchange import PlainExchange
from moe_runtime.cli.bench_pipeline.measure import measure
from moe_runtime.cli.bench_pipeline.plan import plan
from moe_runtime.cli.bench_pipeline.report import describe
from moe_runtime.cli.bench_pipeline.settings import CONTENDERS, Settings, run_config
from moe_runtime.cli.bench_pipeline.summary import summarise
from moe_runtime.cli.testbed import quota
from moe_runtime.errors import ConfigError
from moe_runtime.planner.trace import read_trace

_CAN_LINK = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc", "unshare", "nsenter"))
needs_links = pytest.mark.skipif(
    not _CAN_LINK, reason="network namespaces need root, iproute2 and util-linux"
)
_OPTIONS: dict[str, Any] = {"layout": "pp2", "links": "veth", "rate": "calibrated", "quota": True}
_TINY: dict[str, Any] = {
    "layers": 4,
    "hidden": 32,
    "expert_width": 16,
    "vocab": 64,
    "seq_len": 16,
    "microbatches": 4,
    "rounds": 1,
}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "pp3"}, "expected --layout pp2 or pp4, got 'pp3'"),
        ({"links": "wifi"}, "expected --links veth or none, got 'wifi'"),
        ({"links": "none", "rate": "100"}, "leave one out"),
        ({"rate": "fast"}, "expected --rate in Mbit/s or calibrated, got 'fast'"),
        ({"rate": "0"}, "got '0'"),
        ({"contenders": ["dualpipe", "dualpype"]}, "got 'dualpype'"),
        ({"microbatches": 5}, "even number of microbatches, at least 4"),
        ({"layout": "pp4", "microbatches": 6}, "at least 8"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        plan(**_OPTIONS | options)
    assert "\n" not in str(refused.value)


def test_defaults_give_each_rank_an_equal_share() -> None:
    settings = plan("pp4", "veth", "calibrated", True)
    assert settings.world_size == 8 and settings.cores == (os.cpu_count() or 1) / 8
    assert plan("pp2", "none", "calibrated", False, contenders=["1f1b", "1f1b"]).contenders == ("1f1b",)


@pytest.mark.parametrize("pp", [2, 4])
def test_stages_of_all_contenders_are_cut_alike(pp: int) -> None:
    settings = Settings(pp=pp, microbatches=16)
    for contender in CONTENDERS.values():
        if contender.family == "ours":
            stages = run_config(settings, contender).layout.layers_per_stage
            assert stages == (8 // (pp * contender.chunks),) * (pp * contender.chunks)


def _rank(begin: float, end: float, **told: Any) -> dict[str, Any]:
    common = {
        "loss": 0.5,
        "spans": None,
        "cpu_s": 1.0,
        "exchange_s": 2.0,
        "exchange_wait_s": 0.5,
        "transfer_wait_s": None,
    }
    return {"begin": begin, "end": end, "exchange_bytes": 10, **common, **told}


def test_figures_follow_from_what_ranks_say() -> None:
    settings = Settings(ep=2, rounds=2)

    def step(seconds: float, square: float) -> Step:
        squares = [{"a": square, "b": 1.0}, {"a": square}]
        return [_rank(turn, turn + seconds, squares=each) for turn, each in enumerate(squares)]

    checked = {"first": step(1, 8.0), "second": step(1, 8.002)}
    rounds = [{"first": step(1, 0), "second": step(3, 0)}, {"first": step(2, 0), "second": step(5, 0)}]
    first, second = summarise(checked, rounds, settings)
    assert [first["s_low"], first["s_high"]] == [2.0, 3.0], "from the first begin to the last end"
    assert second["s"] == 5.0 and second["ratio_low"] == 2.0 and second["ratio_high"] == 2.0
    assert first["loss"] == 0.5 and first["hidden"] == 0.75 and first["transfer_wait_s"] is None
    assert first["gradient_norm"] == pytest.approx(17**0.5)
    assert first["is_equal"] and not second["is_equal"]
    assert second["gradients_apart"] == pytest.approx(1.25e-4, rel=1e-3)


@pytest.mark.parametrize(("beside_s", "lasts_s"), [(0.4, 2.0), (0.0, 2.0), (0.4, 3.0)])
def test_the_rate_is_one_at_which_exchanges_take_as_long_as_computation(
    beside_s: float, lasts_s: float
) -> None:
    """Ranks compute 2 s; an exchange takes `beside_s` without any link, and links take their time."""
    limits: list[int | None] = []

    def run(_: str) -> Step:
        wire_s = 0.0 if limits[-1] is None else 80.0 / limits[-1] * lasts_s / 2
        exchange_s = beside_s + wire_s
        told = {"exchange_s": exchange_s, "exchange_wait_s": exchange_s, "transfer_wait_s": 1.0}
        return [_rank(5.0, 5.0 + 3.0 + exchange_s, **told | {"exchange_bytes": 10**7})] * 4

    found = calibrate("any", run, limits.append)
    assert found.compute_s == pytest.approx(2.0) and abs(found.ratio - 1) <= 0.1
    assert limits[0] is None and limits[-1] == found.rate_mbit


def test_a_plain_exchange_gives_every_token_the_weighted_sum_and_its_gradient(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        exchange = PlainExchange(4, group)
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randn(6, 3, generator=draw, dtype=torch.float64).requires_grad_()
        weights = torch.rand(6, 2, generator=draw, dtype=torch.float64).requires_grad_()
        ids = torch.rand(6, 4, generator=draw).argsort(1)[:, :2]
        rows, route = exchange.dispatch(tokens, ids)
        factors = torch.arange(1.0, 5.0, dtype=torch.float64)
        out = exchange.combine(rows * factors.repeat_interleave(route.row_counts)[:, None], weights, route)
        expected = tokens * (weights * factors[ids]).sum(1, keepdim=True)
        torch.testing.assert_close(out, expected)
        pull = torch.randn(out.shape, generator=draw, dtype=torch.float64)
        got = torch.autograd.grad(out, (tokens, weights), pull)
        for gradient, wanted in zip(got, torch.autograd.grad(expected, (tokens, weights), pull), strict=True):
            torch.testing.assert_close(gradient, wanted)
        assert exchange.sent_bytes == 0, "nothing left this rank"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_contenders_of_all_families_reach_the_same_loss_and_gradients(tmp_path: Path) -> None:
    names = ("dualpipe", "1f1b-off", "torch-zbv", "deepspeed-dualpipev")
    result = measure(Settings(has_links=False, contenders=names, **_TINY), tmp_path)
    assert not result["skipped"]
    lines = {line["contender"]: line for line in result["contenders"]}
    assert tuple(lines) == names
    for line in lines.values():
        assert line["is_equal"] and line["gradient_norm"] > 0.01 and 2 < line["loss"] < 6
    assert lines["1f1b-off"]["exchange_bytes"] == lines["dualpipe"]["exchange_bytes"]
    # Beside rows travel their gate weights, as wide as one of 32 columns, and longer messages of counts.
    assert 1 < lines["dualpipe"]["exchange_bytes"] / lines["torch-zbv"]["exchange_bytes"] < 1.15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1f1b-off.json", "dualpipe.json"]
    assert {event.lane for event in read_trace(tmp_path / "dualpipe.json").events} >= {"action", "exchange"}
    assert lines["dualpipe"]["peak_live"] == 3 and lines["torch-zbv"]["simulated"] is None
    assert "deepspeed-dualpipev" in describe(result)


def test_control_groups_that_cannot_be_had_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quota, "_processor_root", lambda: tmp_path / "none")
    with pytest.raises(ConfigError, match="--no-quota"), quota.open_shares(2, 0.5):
        pass


@pytest.mark.slow
@needs_links
def test_every_contender_runs_on_links_and_shares() -> None:
    settings = Settings(**_TINY | {"cores": 0.5, "hidden": 64, "seq_len": 64})
    result = measure(settings)
    assert result["one_to_one"]["rate_mbit"] == result["rate_mbit"] > 0
    ran = {line["contender"] for line in result["contenders"]}
    assert ran == set(CONTENDERS) and not result["skipped"]
    assert set(result["said"]) == {"searched", "searched-off"}
    for line in result["contenders"]:
        assert line["is_equal"], line
        assert line["link_bytes"] * settings.world_size > line["exchange_bytes"]


@pytest.mark.slow
@needs_links
def test_a_killed_benchmark_leaves_groups_that_the_next_one_removes(tmp_path: Path) -> None:
    root = quota._processor_root()
    code = "from moe_runtime.cli.app import main; main()"
    options = ("bench", "pipeline", "--contender", "1f1b", "--rounds", "50")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", code, *options], stdout=subprocess.DEVNULL, env=environment)

    def groups() -> list[Path]:
        return list(root.glob(f"moe-bench-{run.pid}-*"))

    deadline = time.monotonic() + 90
    while not any((group / "cgroup.procs").read_text() for group in groups()):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.2)
    children = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert len(groups()) == 4
    with quota.open_shares(1, 0.5) as shares:
        assert not groups() and shares[0].exists()
    assert not shares[0].exists()
