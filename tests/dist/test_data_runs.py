"""Runs on a mixture and on masked data: the same in every layout, and carried on over a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.config.data import TextForm
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request
from tests.dist.guard_world import Trial, events, records, try_all, write

ONE_SET = ("data.source=null",)
FORM = TextForm(fields=("prompt", "answer"), loss_on=("answer",))
WEIGHTS = {"sums": 3, "letters": 1, "masked": 0}
DUAL = ("layout={pp: 2, schedule: dualpipe}",)
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared sets: sums, letters, and masked ones with some answers, and with none."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(5)
    pairs = [tuple(map(int, generator.integers(0, 100, 2))) for _ in range(400)]
    texts: dict[str, list[dict[str, Any]]] = {
        "sums": [{"text": f"{a} + {b} = {a + b}\n" * 3} for a, b in pairs],
        "letters": [{"text": chr(97 + a % 26) * b + str(a)} for a, b in pairs],
        "masked": [{"prompt": f"{a} + {b} = " * 3, "answer": f"{a + b}" * (b % 3)} for a, b in pairs],
        "silent": [{"prompt": f"{a} + {b} = ", "answer": ""} for a, b in pairs],
    }
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        form = FORM if "prompt" in lines[0] else TextForm()
        request = Request(str(folder / f"{name}.jsonl"), validation_fraction=0.3, form=form)
        prepare(request, folder / name)
    return folder


def mixed(folder: Path, **weights: float) -> tuple[str, ...]:
    sets = {name: {"path": str(folder / name), "weight": weight} for name, weight in weights.items()}
    return (*ONE_SET, "data.path=null", f"data.mixture={json.dumps(sets)}")


def masked(folder: Path, name: str) -> tuple[str, ...]:
    form = json.dumps(FORM.model_dump(include={"fields", "loss_on"}))
    return (*ONE_SET, f"data.path={folder / name}", f"data.form={form}", "data.validation_fraction=0.3")


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    """A run of two mirrored ranks on a mixture, then on with other weights."""
    common = {"train__total_steps": STEPS, "train__eval_every": STEPS, "train__ema_decay": None}
    config = write(folder, {}, **common, optim={"moments": "fp32", "peak_lr": 1e-3})
    changed = (*mixed(folder, sums=1, letters=1, masked=2), f"train.total_steps={2 * STEPS}")
    trials = (Trial("mixed", (*mixed(folder, **WEIGHTS), *DUAL)), Trial("mixed", (*changed, *DUAL)))
    _fine(2, config, trials)
    return config


@pytest.fixture(scope="module")
def alone(folder: Path, config: str) -> str:
    """Runs on one rank, and of masked data on two."""
    silent, some = masked(folder, "silent"), masked(folder, "masked")
    _fine(1, config, (Trial("mixed1", mixed(folder, **WEIGHTS)), Trial("masked1", some)))
    _fine(2, config, (Trial("masked", (*some, *DUAL)), Trial("silent", (*silent, *DUAL))))
    return config


def _fine(ranks: int, config: str, trials: tuple[Trial, ...]) -> None:
    outcomes = try_all(ranks, config, trials)
    assert {outcome.error for seen in outcomes.values() for outcome in seen} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "masked"])
def test_losses_are_those_of_one_rank(name: str, alone: str) -> None:
    pairs = list(zip(records(alone, f"{name}1"), records(alone, name), strict=False))
    assert len(pairs) == STEPS and "val_loss" in pairs[-1][0]
    for one, two in pairs:
        for key in {"loss", "loss_mtp", "grad_norm", "val_loss", "val_bpb"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=2e-4), (one["step"], key)


def test_every_set_is_validated_and_the_whole_counts_each_by_its_share(config: str) -> None:
    record = records(config, "mixed")[STEPS - 1]
    sets = record["val_sets"]
    assert set(sets) == {"sums", "letters", "masked"}
    assert record["val_loss"] == pytest.approx(
        0.75 * sets["sums"]["val_loss"] + 0.25 * sets["letters"]["val_loss"]
    )
    assert len({round(one["val_loss"], 4) for one in sets.values()}) == 3


def test_epochs_and_shares_are_told_at_the_start(config: str) -> None:
    (first, *_) = events(config, "mixed", "data")
    assert first["message"].startswith("data: sums 75 %, ") and "letters 25 %" in first["message"]
    assert records(config, "mixed")[STEPS - 1]["epoch"] == pytest.approx(
        max(first["epochs"].values()), rel=1e-6
    )


def test_changed_weights_are_told_and_each_set_goes_on(config: str) -> None:
    said = [event["message"] for event in events(config, "mixed", "resume")]
    assert any(line.startswith("data.mixture: was sums 75 %, letters 25 %, is sums 25 %") for line in said)
    assert [record["step"] for record in records(config, "mixed")] == list(range(1, 2 * STEPS + 1))
    manifests = sorted(Path(config).parent.glob("runs/mixed/checkpoints/step_*/manifest.json"))
    segments = json.loads(manifests[-1].read_text())["state"]["data"]["segments"]
    assert segments[1] == {
        "first": 8 * STEPS,
        "quotas": {"sums": 1, "letters": 1, "masked": 2},
        "before": {"sums": 6 * STEPS, "letters": 2 * STEPS},
    }


@pytest.mark.slow
def test_without_any_target_there_is_no_loss_and_training_goes_on(alone: str) -> None:
    for record in records(alone, "silent"):
        assert record["loss"] is None and record.get("val_loss") is None and not record["skipped"]
        assert record["loss_balance"] > 0 and math.isfinite(record["grad_norm"]) and record["grad_norm"] > 0
