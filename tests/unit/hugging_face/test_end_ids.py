"""Ids that end text outlive a round trip, and end what `generate` writes, with or without a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.hugging_face.end_ids import eos_ids_of, read_text_ids
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.cli.app import app
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError
from tests.unit.hugging_face.models import BASE, make_model, save

MODEL = ModelConfig.model_validate(BASE | {"vocab_size": 264, "mtp_depth": 0})


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    export_model(save(make_model(MODEL), tmp_path / "run"), tmp_path / "hub", ExportOptions())
    return tmp_path / "hub"


def say(hub: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> None:
    (hub / "config.json").write_text(json.dumps(read_object(hub / "config.json") | config))
    if generation is not None:
        (hub / "generation_config.json").write_text(json.dumps(generation))


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("config", "generation", "eos_ids"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1}, {"bos_token_id": 0, "eos_token_id": [1, 9]}, {1, 9}),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {5}),
        ({"eos_token_id": None}, None, set()),
    ],
)
def test_ids_come_back_as_they_were(
    hub: Path, config: dict[str, Any], generation: dict[str, Any] | None, eos_ids: set[int]
) -> None:
    say(hub, config, generation)
    ours, again = hub.parent / "ours", hub.parent / "again"
    assert import_model(hub, ours, ImportOptions()).eos_ids == eos_ids
    assert eos_ids_of(open_checkpoint(ours)) == eos_ids
    export_model(open_checkpoint(ours), again, ExportOptions())
    assert read_text_ids(again) == read_text_ids(hub)


def test_generate_stops_at_the_ids_of_the_config(hub: Path) -> None:
    ask = ("--prompt-ids", "1,2,3", "--max-tokens", 8, "--temperature", 0, "--json")
    free = json.loads(run("generate", hub.parent / "run", *ask).stdout)["tokens"]
    say(hub, {"eos_token_id": [263, free[2]]})
    run("convert", "import", hub, hub.parent / "ours")
    ended = json.loads(run("generate", hub.parent / "ours", *ask).stdout)
    assert ended["tokens"] == free[: free.index(free[2])] and len(ended["tokens"]) < len(free)


def test_a_tokenizer_that_ends_text_otherwise_is_told_of(hub: Path) -> None:
    say(hub, {"eos_token_id": 7})
    said = run("convert", "import", hub, hub.parent / "ours", "--tokenizer", "byte").output
    assert "text ends with 7 by the model's configs and with 256 by its tokenizer" in said
    run("convert", "export", hub.parent / "ours", hub.parent / "again")
    assert read_text_ids(hub.parent / "again")["config.json"]["eos_token_id"] == 7
    assert read_object(hub.parent / "again/tokenizer_config.json")["eos_token"] == "<|eos|>"


@pytest.mark.parametrize("value", ["1", 1.0, True, -1, [1, "2"], {"a": 1}])
def test_an_id_that_is_none_is_refused(hub: Path, value: object) -> None:
    say(hub, {}, {"eos_token_id": value})
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: eos_token_id: expected an id or a list"
    ):
        import_model(hub, hub.parent / "ours", ImportOptions())
