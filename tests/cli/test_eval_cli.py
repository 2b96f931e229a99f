"""eval, compare and convert tasks: figures against transformers alone, reports, and what users do wrong."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.errors import CheckpointError, ConfigError, DataError
from tests.unit.evaluation.samples import BYTES, CONTEXT, item_lines, saved, stdlib_texts, write_items
from tests.unit.hugging_face.models import load_peer

BEFORE = {"checkpoint", "step", "data", "ema", "loss", "perplexity", "bits_per_byte", "tokens", "bytes"}


def call(*arguments: object) -> str:
    """What a command prints; its error is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, a prepared set of two folders, and items."""
    folder = tmp_path_factory.mktemp("eval")
    saved(folder / "run", BYTES)
    call("convert", "export", folder / "run", folder / "hub")
    for number, text in enumerate(stdlib_texts()):
        for piece in range(4):
            part = folder / "texts" / ("even" if piece % 2 else "odd")
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number}_{piece}.txt").write_text(text[piece * 400 :][: 150 + 90 * piece])
    prepare(Request(f"dir:{folder / 'texts'}", "byte", 0, 0.0, 0.45), folder / "data")
    write_items(folder / "items.jsonl", item_lines(6, 2))
    return folder


def reckon(peer: Any, rows: list[list[int]], scored: list[int]) -> float:
    """Nats of the last `scored` ids of each row, by transformers alone, one row at a time."""
    total = 0.0
    for row, count in zip(rows, scored, strict=True):
        with torch.no_grad():
            logits = peer(torch.tensor([row[:-1]])).logits[0, -count:].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[-count:]), reduction="sum"))
    return total


def test_bits_per_byte_are_those_of_transformers_on_the_export(made: Path) -> None:
    said = json.loads(call("eval", made / "run", "--data", made / "data", "--sequences", 0, "--json"))
    dataset = TokenDataset.open(made / "data", "validation")
    stream, count = dataset.read(0, dataset.num_tokens).tolist(), -(-dataset.num_tokens // CONTEXT)
    rows = [stream[number * CONTEXT :][: CONTEXT + 1] for number in range(count)]
    rows = [row for row in rows if len(row) > 1]
    nats = reckon(load_peer(made / "hub", 3), rows, [len(row) - 1 for row in rows])
    num_bytes = sum(token < 256 for token in stream[1:])
    assert (said["tokens"], said["bytes"]) == (len(stream) - 1, num_bytes)
    assert said["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert BatchLoader(dataset, CONTEXT, 1, 0).samples_per_epoch == count


def test_an_export_and_its_checkpoint_have_equal_bits_per_byte_and_both_are_right(made: Path) -> None:
    options = ("--data", made / "data", "--tasks", made / "items.jsonl", "--max-bytes", 200)
    said = call("compare", made / "run", made / "hub", *options, "--out", made / "table")
    assert said == (made / "table/comparison.md").read_text()
    assert (made / "table/comparison.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((made / "table/comparison.json").read_text())
    assert [one["kind"] for one in found["models"]] == [
        "moe_runtime, step 1", "transformers, DeepseekV3ForCausalLM",
    ]  # fmt: skip
    assert found["models"][0]["parameters"] == found["models"][1]["parameters"]
    assert "windows of 64 tokens" in found["rule"]
    total, *others = found["rows"]
    assert [row["part"] for row in others[:2]] == ["even", "odd"]
    for row in found["rows"]:
        ours, theirs = (one["mean"] for one in row["values"])
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert not total["differences"][0]["resolved"] or abs(total["differences"][0]["mean"]) < 1e-5
    # The rule once more: documents apart, each after the end of a text, half a window on each time.
    dataset, peer = TokenDataset.open(made / "data", "validation"), load_peer(made / "hub", 3)
    starts = [int(one) for one in dataset.document_starts()]
    nats, num_bytes = 0.0, 0
    for begin, end in pairwise(starts):
        ids = [256, *dataset.read(begin, end - begin - 1).tolist()[:200]]
        num_bytes += len(ids) - 1
        rows, scored = [ids[:65]], [min(64, len(ids) - 1)]
        while sum(scored) < len(ids) - 1:
            rows.append(ids[32 * len(rows) :][:65])
            scored.append(min(32, len(ids) - 1 - sum(scored)))
        nats += reckon(peer, rows, scored)
    assert total["values"][0]["mean"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_the_report_keeps_its_keys_and_line_and_tells_sources_apart(made: Path) -> None:
    command = ("eval", made / "run", "--data", made / "data", "--sequences", 8)
    said = json.loads(call(*command, "--json"))
    assert set(said) >= BEFORE and 0 < said["tokens"] <= 8 * CONTEXT and said["data"] == str(made / "data")
    assert sum(one["tokens"] for one in said["sources"]) == said["tokens"]
    assert [one["source"] for one in said["sources"]] == ["even", "odd"]
    first, even, _ = call(*command).splitlines()
    assert first.startswith(
        f"step 1: loss {said['loss']:.4f}, perplexity {said['perplexity']:.2f}, "
        f"{said['bits_per_byte']:.3f} bits per byte ({said['tokens']} tokens of {made / 'data'}) ["
    )
    assert even.startswith("  even  loss ") and " documents]" in even


def test_several_sets_have_a_total(made: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"x = {n}" * 9}) + "\n" for n in range(30))
    )
    prepare(Request(str(tmp_path / "more.jsonl"), "byte", validation_fraction=0.4), tmp_path / "more")
    command = ("eval", made / "run", "--data", made / "data", "--data", tmp_path / "more")
    said = json.loads(call(*command, "--json"))
    assert said["data"] == [str(made / "data"), str(tmp_path / "more")]
    assert said["tokens"] == sum(one["tokens"] for one in said["sets"])
    nats = sum(one["tokens"] * one["loss"] for one in said["sets"])
    assert said["loss"] == pytest.approx(nats / said["tokens"])
    assert call(*command).splitlines()[-1].startswith("total: loss ")


def test_tasks_are_scored_and_each_item_is_written(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    command = ("eval", made / "run", "--tasks", made / "items.jsonl", "--shots", 1, "--items", out)
    said = json.loads(call(*command, "--json"))
    (task,) = said["tasks"]
    assert task["metrics"]["acc"]["items"] == 5 and task["metrics"]["exact"]["items"] == 2
    items = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["id"] for one in items][:2] == ["choice 1", "choice 2"] and len(items) == 7
    assert task["metrics"]["acc"]["mean"] == sum(one.get("acc", 0) for one in items) / 5
    assert task["cut"] == sum(one["cut"] for one in items) > 0
    lines = call(*command).splitlines()
    assert lines[0].startswith(f"{made / 'items.jsonl'}: acc ") and "cut from the left" in lines[-1]


def test_items_become_tasks_of_the_harness(made: Path, tmp_path: Path) -> None:
    said = call("convert", "tasks", made / "items.jsonl", tmp_path / "tasks", "--shots", 1)
    assert "7 items as items (a group of 3 tasks)" in said and "--include_path" in said
    assert len(list((tmp_path / "tasks").glob("*.yaml"))) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("eval", "run"), ConfigError, "expected --data FOLDER or --tasks"),
        (("eval", "run", "--data", "data", "--items", "x"), ConfigError, "--items: expected --tasks"),
        (("eval", "run", "--tasks", "none.jsonl"), DataError, "none.jsonl: expected a JSONL file"),
        (("eval", "run", "--tasks", "texts/odd/0_0.txt"), DataError, "0_0.txt:1: expected a JSON object"),
        (("compare", "run", "hub", "--out", "t"), ConfigError, "compare: expected --data"),
        (
            ("compare", "run", "hub", "--data", "data", "--out", "t", "--context", "65"),
            ConfigError,
            "--context: expected 2 to 64, what all models see, got 65",
        ),
        (
            ("compare", "run", "--data", "data", "--out", "items.jsonl/t"),
            ConfigError,
            "--out: expected a folder",
        ),
        (
            ("eval", "run", "--tasks", "items.jsonl", "--items", "items.jsonl/x"),
            ConfigError,
            "--items: expected a folder",
        ),
        (("compare", "run", "texts", "--data", "data", "--out", "t"), CheckpointError, "expected a run or"),
        (
            ("eval", "run", "--tasks", "items.jsonl", "--items", "data/../items.jsonl"),
            ConfigError,
            "expected another file than --tasks",
        ),
        (("eval", "run", "--data", "data", "--data", "./data"), ConfigError, "expected each path once"),
        (("compare", "run", "./run", "--data", "data", "--out", "t"), ConfigError, "expected each path once"),
        (("convert", "tasks", "none.jsonl", "t"), DataError, "none.jsonl: expected a JSONL file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    made: Path, arguments: tuple[str, ...], error: type[Exception], says: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(made)
    with pytest.raises(error) as raised:
        call(*arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert not (made / "t").exists()


def test_without_matplotlib_the_table_can_be_had_without_a_picture(
    made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ("compare", made / "run", "--data", made / "data", "--documents", 2, "--out", tmp_path / "t")
    with pytest.raises(ConfigError, match="pip install matplotlib, or say --no-plot"):
        call(*command)
    call(*command, "--no-plot")
    assert {one.name for one in (tmp_path / "t").iterdir()} == {"comparison.md", "comparison.json"}


@pytest.mark.slow
def test_the_harness_runs_by_the_command_that_is_printed(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    said = call("convert", "tasks", made / "items.jsonl", tmp_path / "tasks", "--name", "mine")
    command = said[said.index("lm-eval run") :].split()[1:]
    command[command.index("pretrained=HF_DIR")] = f"pretrained={made / 'hub'},dtype=float32"
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command, "--device", "cpu", "--output_path", tmp_path / "out"],
        env=os.environ | offline | {"HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    ours = json.loads(call("eval", made / "run", "--tasks", made / "items.jsonl", "--json"))["tasks"][0]
    assert found["mine_1"]["acc,none"] == pytest.approx(ours["metrics"]["acc"]["mean"])
    assert found["mine_1"]["acc_bytes,none"] == pytest.approx(ours["metrics"]["acc_norm"]["mean"])
