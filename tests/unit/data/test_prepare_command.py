import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from moe_runtime.cli.prepare import prepare
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
