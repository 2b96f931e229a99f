import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from moe_runtime.cli.prepare import _Lines, prepare
from moe_runtime.data.manifest import read_manifest
from moe_runtime.errors import DataError


def run(*words: str) -> tuple[str, BaseException | None]:
    app = typer.Typer()
    app.command()(prepare)
    result = CliRunner().invoke(app, list(words))
    return result.output, result.exception


def test_command_prepares_and_tells_what_it_made(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i % 9}"}) + "\n" for i in range(10)))
    out = tmp_path / "out"
    said, error = run("--source", str(source), "--out", str(out), "--fim-rate", "1", "--tokenizer", "byte")
    assert error is None
    assert "train: 80 tokens, 8 documents, 8 rewritten for infill" in said
    assert "duplicates: 1" in said
    assert read_manifest(out).fim_rate == 1.0


def test_command_refuses_bad_shares(tmp_path: Path) -> None:
    for option in ("--fim-rate", "--validation-fraction"):
        _, error = run("--source", "builtin:stdlib", "--out", str(tmp_path / "out"), option, "1.5")
        assert isinstance(error, DataError)
        assert option in str(error)


def test_masks_are_asked_for_by_options_and_counted(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [{"q": f"{i} + 1 = ", "a": str(i + 1)} for i in range(10, 20)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, error = run("--source", str(source), "--out", str(out), "--fields", "q,a", "--loss-on", "a")
    assert error is None and "train: 108 tokens, 27 of them targets, 9 documents" in said
    assert "MB/s" in said
    assert read_manifest(out).form.loss_on == ("a",)
    said, error = run("--source", str(source), "--out", str(out), "--fields", "q,a", "--loss-on", "a")
    assert error is None and "was there already; --force prepares it anew" in said
    _, error = run("--source", str(source), "--out", str(out), "--fields", "q,a", "--loss-on", "b")
    assert isinstance(error, DataError) and str(error) == "--loss-on: expected some of q, a, got b"


def test_lines_in_a_pipe_come_now_and_then_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("moe_runtime.cli.prepare.time.monotonic", lambda: now[0])
    console = Console(record=True, width=200, file=io.StringIO())
    lines = _Lines(console)
    for second in range(13):
        now[0] = float(second)
        lines.show("reading", second * 10_000_000, 120_000_000)
    lines.show("reading", 120_000_000, 120_000_000)
    lines.show("tokenising", 0, 120_000_000)  # over at once: nothing to tell
    lines.show("tokenising", 120_000_000, 120_000_000)
    assert console.export_text().splitlines() == [
        "reading: 50.0 of 120.0 MB, 10.0 MB/s, 0:00:07 left",
        "reading: 100.0 of 120.0 MB, 10.0 MB/s, 0:00:02 left",
        "reading: 120.0 of 120.0 MB, 10.0 MB/s",
    ]


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    _, error = run("--source", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out"))
    assert isinstance(error, DataError) and not list(tmp_path.iterdir())


def test_the_vocabulary_is_counted_and_one_file_is_one_source_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "web.jsonl"
    source.write_text("".join(json.dumps({"text": f"low lower lowest {i}"}) + "\n" for i in range(40)))
    words = ("--out", str(tmp_path / "out"), "--tokenizer", "bpe:9999999")
    said, error = run("--source", str(source), *words)
    made = read_manifest(tmp_path / "out").tokenizer.vocab_size
    assert error is None and f"vocabulary: {made:,} entries, for the text has no more to merge" in said
    said, error = run("--source", "./web.jsonl", *words)
    assert error is None and "was there already" in said
    (tmp_path / "other.jsonl").write_text(source.read_text())
    _, error = run("--source", "other.jsonl", *words)
    assert isinstance(error, DataError) and "already prepared with source" in str(error)
