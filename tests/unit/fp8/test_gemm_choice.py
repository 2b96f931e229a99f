"""The choice of a back end by measured speeds: what is nearest, what cannot run, what is said."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.cli.bench_fp8 import run
from moe_runtime.errors import ConfigError
from moe_runtime.fp8 import gemm_choice, gemm_reference
from moe_runtime.fp8.gemm_choice import backend_for

GPU = torch.device("cuda", 0)
LARGE = {"bf16": 700, "triton": 800, "deepgemm": 1300, "scaled_mm": 1000}
SMALL = {"bf16": 70, "triton": 80, "deepgemm": 60, "scaled_mm": 50}
LINES: list[dict[str, Any]] = [
    {"m": 4096, "n": 4096, "k": 7168, "groups": 0, "tflops": LARGE},
    {"m": 64, "n": 2048, "k": 512, "groups": 0, "tflops": SMALL},
]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A device named Pretended where back ends run but for those with a reason here."""
    reasons: dict[str, str | None] = {}
    for name in ("_choose", "_able", "_lines", "_say", "_table"):
        getattr(gemm_choice, name).cache_clear()
    monkeypatch.setattr(gemm_choice, "_used", {})
    monkeypatch.setattr(gemm_choice, "device_name", lambda device: "Pretended")
    monkeypatch.setattr(gemm_choice, "_table", lambda: {"Pretended": {"dense": LINES}})

    def module(name: str) -> Any:
        return SimpleNamespace(why_not=lambda device: reasons.get(name), name=name)

    monkeypatch.setattr(gemm_choice, "module_of", module)
    return reasons


def chosen(role: str, m: int, n: int, k: int, groups: int = 0) -> str:
    name: str = backend_for(role, m, n, k, GPU, groups=groups).name  # type: ignore[attr-defined]
    return name


def test_the_fastest_at_the_nearest_shape(pretended: dict[str, str | None]) -> None:
    assert chosen("dense", 8192, 7168, 2048) == "deepgemm"
    assert chosen("dense", 100, 1000, 1000) == "triton"
    assert chosen("dense", 0, 4096, 7168) == "triton"
    assert gemm_choice.used() == {"dense": {"deepgemm": 1, "triton": 2}}


def test_what_cannot_run_is_left_out_aloud(
    pretended: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    pretended["deepgemm"] = "a wheel, got none"
    with caplog.at_level(logging.INFO, "moe_runtime.fp8"):
        assert [chosen("dense", 4096, 4096, size) for size in (7168, 7040)] == ["scaled_mm"] * 2
        assert chosen("groups", 4096, 4096, 7168) == "triton"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert told[0] == "FP8 products: deepgemm is left out of the choice: expected a wheel, got none"
    assert "scaled_mm runs on Pretended" in told[1]
    assert "(groups): nothing measured on Pretended: deepgemm, triton, scaled_mm" in told[2]
    assert "triton runs on Pretended" in told[3]


def test_where_nothing_fast_runs_it_says_why(pretended: dict[str, str | None]) -> None:
    for name in ("triton", "scaled_mm", "deepgemm"):
        pretended[name] = "a Hopper GPU, got Pretended"
    with pytest.raises(ConfigError, match=r"no fast back end runs .*a Hopper GPU.*; use BF16"):
        chosen("wgrad", 1, 1, 1)


def test_a_device_like_one_that_was_measured(
    pretended: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gemm_choice, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gemm_choice, "_table", lambda: {"NVIDIA H200": {"dense": LINES}})
    assert chosen("dense", 100, 1000, 1000) == "triton"
    assert "nothing measured on NVIDIA H100 80GB HBM3: back ends are chosen by the speeds of NVIDIA H200" in (
        caplog.text
    )


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("has_deepgemm", [True, False])
def test_what_the_stored_table_chooses(
    pretended: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, device: str, has_deepgemm: bool
) -> None:
    table = json.loads(gemm_choice.TABLE.read_text())["devices"]
    monkeypatch.setattr(gemm_choice, "device_name", lambda _: device)
    monkeypatch.setattr(gemm_choice, "_table", lambda: table)
    pretended["deepgemm"] = None if has_deepgemm else "a wheel, got none"

    def best(otherwise: str) -> str:
        return "deepgemm" if has_deepgemm else otherwise

    assert chosen("dense", 4096, 7168, 4096) == best("scaled_mm")
    assert chosen("dense", 4096, 7168, 2112) == best("triton")
    assert chosen("wgrad", 4096, 7168, 4096) == best("scaled_mm")
    # As many rows, and as ragged, but many groups or few: a call for each group costs the host as much.
    for rows in (32768, 32304, 32274):
        assert chosen("groups", rows, 4096, 7168, 32) == best("triton")
        assert chosen("groups", rows, 4096, 7168, 8) == best("scaled_mm")
        assert chosen("wgrad_groups", 4096, 7168, rows, 32) == best("triton")
        assert chosen("wgrad_groups", 4096, 7168, rows, 8) == best("scaled_mm")
    assert chosen("groups", 8192, 4096, 7168, 256) == best("triton")


@pytest.mark.parametrize("name", ["triton", "scaled_mm", "deepgemm"])
def test_a_back_end_asked_for_that_cannot_run_raises(name: str) -> None:
    with pytest.raises(ConfigError, match=f"by {name}: expected a CUDA device, got cpu"):
        backend_for("dense", 1, 1, 1, torch.device("cpu"), name)


def test_names_and_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"expected a back end of reference.*got cublas"):
        backend_for("dense", 1, 1, 1, torch.device("cpu"), "cublas")
    assert backend_for("dense", 1, 1, 1, torch.device("cpu")) is gemm_reference


def test_the_stored_table_can_be_read() -> None:
    for roles in json.loads(gemm_choice.TABLE.read_text())["devices"].values():
        for role in gemm_choice.ROLES:
            assert all(line["tflops"]["bf16"] > 0 and line["m"] > 0 for line in roles[role])


def test_a_measurement_is_stored_as_it_is_read(tmp_path: Path) -> None:
    table = tmp_path / "crossover.json"
    table.write_text('{"devices": {"Other": {}}}')
    told = {"ragged": False, "shape": "", "failed": {}}
    lines = [{**line, "role": role, **told} for role in ("dense", "groups") for line in LINES]
    result = {"device": "Pretended", "torch": "2.11", "peaks": {"bf16_tflops": 790}, "lines": lines}
    run.write_table(result, table)
    kept = json.loads(table.read_text())["devices"]
    assert set(kept) == {"Other", "Pretended"}
    assert [line["tflops"] for line in kept["Pretended"]["dense"]] == [line["tflops"] for line in LINES]
    assert kept["Pretended"]["groups"] == []
    with pytest.raises(ConfigError, match="where a fast back end runs"):
        run.write_table({**result, "lines": []}, table)


def test_the_emulation_is_measured_without_a_gpu() -> None:
    lines: list[dict[str, Any]] = []
    result = run.measure("cpu", lines.append)
    assert [line["role"] for line in lines] == ["dense", "wgrad", "groups", "wgrad_groups"]
    assert all(0 < line["difference"]["reference"] < 1e-3 and not line["failed"] for line in lines)
    assert result["lines"] == lines and "reference" in run.describe(lines[0])
