"""convert: what it writes is loaded by transformers, and what it reads by every command of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, open_checkpoint
from moe_runtime.checkpoint.load import load_model
from moe_runtime.cli.app import app
from moe_runtime.config.schema import ModelConfig
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.errors import CheckpointError, ConfigError, DataError
from tests.unit.hugging_face.models import BASE, difference, load_peer, make_model, random_tokens, save

MODEL = ModelConfig.model_validate(BASE | {"vocab_size": 264})
TOKENIZER = {TOKENIZER_FILE: ByteTokenizer().to_json().encode()}


def call(*arguments: object) -> str:
    """What a command prints, warnings too; its error is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and the export's import."""
    folder = tmp_path_factory.mktemp("convert")
    save(make_model(MODEL), folder / "run", TOKENIZER)
    call("convert", "export", folder / "run", folder / "hub")
    call("convert", "import", folder / "hub", folder / "ours")
    return folder


def test_an_export_is_loaded_by_autoclasses_without_remote_code(made: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = load_peer(made / "hub", MODEL.num_layers)
    tokens = random_tokens(MODEL, 1, 32)
    with torch.no_grad():
        assert difference(load_model(made / "run")(tokens), peer(tokens).logits) <= 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "hub", trust_remote_code=False)
    assert tokenizer("def f<|eos|>é")["input_ids"] == ByteTokenizer().encode("def f<|eos|>é").tolist()
    assert tokenizer.eos_token_id == ByteTokenizer().eos_id == peer.generation_config.eos_token_id
    assert {path.name for path in (made / "hub").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_an_import_is_a_checkpoint_for_eval_generate_and_checkpoint_commands(made: Path) -> None:
    texts = made / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox. " * 20)
    prepare(Request(f"dir:{texts}", "byte", 0, 0.0, 0.3), made / "data")
    losses = []
    for path in (made / "run", made / "ours"):
        said = json.loads(call("eval", path, "--data", made / "data", "--sequences", 4, "--json"))
        losses.append(said["loss"])
    assert losses[0] == losses[1]
    assert call("checkpoint", "verify", made / "ours") == "ours: good\n"
    options = ("--prompt", "def ", "--max-tokens", 4, "--temperature", 0, "--json")
    ours, theirs = (json.loads(call("generate", made / name, *options)) for name in ("ours", "run"))
    assert ours["tokens"] == theirs["tokens"]


def test_fp8_and_dtype_choose_what_is_written(made: Path, tmp_path: Path) -> None:
    said = call("convert", "export", made / "run", tmp_path / "fp8", "--fp8", "--dtype", "bf16")
    assert "widths" not in said
    fields = json.loads((tmp_path / "fp8/config.json").read_text())
    assert fields["quantization_config"]["quant_method"] == "fp8" and fields["torch_dtype"] == "bfloat16"
    call("convert", "import", tmp_path / "fp8", tmp_path / "ours", "--dtype", "fp32")
    assert load_model(tmp_path / "ours").embed.weight.dtype == torch.float32


def test_a_model_without_tokenizer_is_told_of_and_may_be_given_one(made: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hub / name).write_bytes((made / "hub" / name).read_bytes())
    assert "has no tokenizer" in call("convert", "import", hub, tmp_path / "bare")
    assert load_model(tmp_path / "bare") is not None
    with pytest.raises(ConfigError, match="expected a tokenizer, got none"):
        call("generate", tmp_path / "bare", "--prompt", "x")
    assert "carries no tokenizer" in call("convert", "export", tmp_path / "bare", tmp_path / "again")
    call("convert", "import", hub, tmp_path / "given", "--tokenizer", "byte")
    assert call("generate", tmp_path / "given", "--prompt", "x", "--max-tokens", 2)
    (hub / "tokenizer.json").write_text("{}")
    assert "left out" in call("convert", "import", hub, tmp_path / "broken")


def test_commands_for_checkpoints_point_from_a_hub_folder_to_the_import(made: Path) -> None:
    for command in (("generate", made / "hub", "--prompt", "x"), ("eval", made / "hub", "--data", made)):
        with pytest.raises(CheckpointError, match=r"got a model in Hugging Face's form; .*convert import"):
            call(*command)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("export", "none", "hub"), CheckpointError, "none"),
        (("import", "none", "ours"), CheckpointError, "config.json: expected a file"),
        (
            ("import", "none", "ours", "--dtype", "int8"),
            ConfigError,
            "--dtype: expected one of fp32, bf16",
        ),
        (("export", "none", "hub", "--shard-gb", "inf"), ConfigError, "--shard-gb: expected a number from"),
        (("import", "none", "ours", "--shard-gb", "1e300"), ConfigError, "to 1e+06, got 1e+300"),
        (("import", "none", "ours", "--shard-gb", "nan"), ConfigError, "got nan"),
        (("import", "none", "ours", "--tokenizer", "nonsense"), DataError, "nonsense"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], error: type[Exception], says: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        call("convert", *arguments)
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_real_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "moe_runtime",
        "convert",
        "import",
        str(tmp_path),
        str(tmp_path / "ours"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_manifest_of_an_import_says_where_its_model_begins(made: Path) -> None:
    checkpoint = open_checkpoint(made / "ours")
    assert (checkpoint.manifest.step, checkpoint.manifest.partitions) == (0, ())
    assert checkpoint.manifest.state["tokenizer"] == "byte"
