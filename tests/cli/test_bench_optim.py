"""`bench optim`: what is absent or fails is named, what is slow is timed less often, tables hold it all."""

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.cli.bench_optim import cpu, cuda
from moe_runtime.errors import ConfigError


def absent(param: torch.Tensor) -> torch.optim.Optimizer:
    import a_peer_that_is_not_installed  # noqa: F401

    raise AssertionError


class Failing(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        raise RuntimeError("no kernel for cpu\nand a long story")


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict:
    peers = {
        cpu.OURS: cpu.CONTENDERS[cpu.OURS],
        "torch AdamW fused, fp32": cpu.CONTENDERS["torch AdamW fused, fp32"],
        "absent": absent,
        "failing": lambda param: Failing([param], lr=0.1),
    }
    monkeypatch.setattr(cpu, "CONTENDERS", peers)
    return cpu.time_here(elements=5000, rounds=3)


def test_missing_peers_are_named_with_the_reason(result: dict) -> None:
    assert set(result["rows"]) == {cpu.OURS, "torch AdamW fused, fp32"}
    assert result["rows"][cpu.OURS]["ratio"] == result["rows"][cpu.OURS]["best"] == 1
    assert "No module named 'a_peer_that_is_not_installed'" in result["missing"]["absent"]
    assert result["missing"]["failing"] == "RuntimeError: no kernel for cpu"
    table = cpu.describe([result])
    assert all(name in table for name in (*result["rows"], "absent", "missing: RuntimeError"))


def test_slow_contenders_are_timed_in_every_fifth_round(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    timed = cpu._timed

    def counting(name: str, optimizer: torch.optim.Optimizer) -> float:
        nonlocal count
        count += name == "slow"
        return 2.0 if name == "slow" else timed(name, optimizer)

    ours = cpu.CONTENDERS[cpu.OURS]
    monkeypatch.setattr(cpu, "CONTENDERS", {cpu.OURS: ours, "slow": ours})
    monkeypatch.setattr(cpu, "_timed", counting)
    cpu.time_here(elements=100, rounds=7)
    assert count == 2 + 2  # two to see what it takes, then rounds 0 and 5


def test_a_gpu_that_is_not_there_is_refused_in_one_line() -> None:
    from moe_runtime.cli.bench import app

    if torch.cuda.is_available():
        pytest.skip("has one")
    for device, expected in (("cuda", "a CUDA device"), ("tpu", "cpu or cuda")):
        error = CliRunner().invoke(app, ["optim", "--device", device]).exception
        assert isinstance(error, ConfigError) and f"expected {expected}" in str(error)


def test_differing_bits_are_listed_and_nothing_is_timed() -> None:
    result = {"device": "some", "torch": "2", "differing": ["weight of 127 (bf16 gradient)"], "results": []}
    assert "weight of 127 (bf16 gradient)" in cuda.describe(result)
