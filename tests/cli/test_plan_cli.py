"""`moe-runtime plan`, in this process: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from moe_runtime.cli.app import app
from moe_runtime.cli.usage import run_typer
from moe_runtime.errors import MoeRuntimeError
from tests.arch.sources import ROOT

MODEL = str(ROOT / "configs/model/tiny.yaml")
RUN = ("batch.seq_len=128", "batch.global_batch_size=16", "train.total_tokens=1e6")


def say(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    assert run_typer(app, "moe-runtime", ["plan", *arguments]) == code
    return capsys.readouterr()


def refusal(*arguments: str) -> str:
    with pytest.raises(MoeRuntimeError) as caught:
        run_typer(app, "moe-runtime", ["plan", *arguments])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_config_is_planned_with_the_rest_as_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("layout.pp=2", "layout.dp=2", "layout.ep=2", "layout.schedule=auto")
    fields = json.loads(say(capsys, MODEL, *layout, *RUN, "--cluster", "h800", "--json")[0])
    assert fields["layout"]["world_size"] == 4 and fields["memory"]["fits"]
    assert sum(fields["phases_s"].values()) == pytest.approx(fields["step_s"])


def test_a_run_config_is_told_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = say(capsys, "quickstart")
    assert not err
    for word in ("tokens/s/GPU", "1F1B", "MFU, fp8 peak", "GiB", "dispatch", "low end"):
        assert word in out
    assert max(map(len, out.splitlines())) < 180


def test_what_does_not_fit_is_planned_and_ends_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ("layout.pp=4", "layout.dp=64", "recompute.mla_up=false")
    out, err = say(capsys, "v3_671b", *few, "--json", code=2)
    assert json.loads(out)["memory"]["fits"] is False
    assert err.count("\n") == 1 and "does not fit on h800" in err and "84.90 GB" in err


def test_nonsense_is_refused_with_its_reason(tmp_path: Path) -> None:
    text = (ROOT / "configs/cluster/h800.yaml").read_text()
    negative = tmp_path / "negative.yaml"
    negative.write_text(text.replace("gbps: {low: 40, central: 45", "gbps: {low: -40, central: 45"))
    told = refusal("v3_671b", "--cluster", str(negative))
    assert "negative.yaml:17: network.gbps.low" in told and "-40" in told
    for key, old, new, said in (
        ("nothing", "gbps: {low: 40, central: 45", "gbps: {low: 0, central: 45", "more than 0, got 0"),
        (
            "all",
            "multiprocessors: {low: 20, central: 20, high: 24",
            "multiprocessors: {low: 20, central: 20, high: 132",
            "less than the 132",
        ),
        (
            "share",
            "memory_bound: {low: 0.60, central: 0.80, high: 0.91",
            "memory_bound: {low: 0.60, central: 0.80, high: 1.5",
            "at most 1, got 0.6 to 1.5",
        ),
        ("unknown", "price_usd_hour:", "prize: 1\nprice_usd_hour:", "prize: unknown key"),
    ):
        assert old in text, key
        file = tmp_path / f"{key}.yaml"
        file.write_text(text.replace(old, new))
        assert said in refusal("quickstart", "precision=bf16", "--cluster", str(file)), key
    assert "weights alone take" in refusal("quickstart", "model.num_layers=1000000000")
    assert "did you mean h800?" in refusal("v3_671b", "--cluster", "h8000")
    assert "ep 256" in refusal("v3_671b", "layout.ep=256")
    assert "batch: required key is missing" in refusal(MODEL, "train.total_tokens=1e6")
    told = refusal("quickstart", "precision=fp64")
    assert "expected one that h800 has a peak for" in told and "fp64" in told
    for value in ("0.5", "inf", "nan"):
        assert "imbalance" in refusal("v3_671b", "--imbalance", value)
