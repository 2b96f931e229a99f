"""checkpoint, generate and eval on a run that a test made: what they print, and how they refuse."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.checkpoint.folder import TOKENIZER_FILE
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.cli.app import app
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.errors import CheckpointError, ConfigError, DataError
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers
from tests.unit.checkpoint.models import CONFIG

MODEL = CONFIG.model.model_dump() | {"vocab_size": 264}
RUN = RunConfig.model_validate(CONFIG.model_dump() | {"model": MODEL})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two checkpoints, and prepared data."""
    folder = tmp_path_factory.mktemp("records")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"document {number}: " + "the quick brown fox. " * 20)
    prepare(Request(f"dir:{texts}", "byte", 0, 0.0, 0.3), folder / "data")
    store = CheckpointStore(folder / "run", Peers(), 2)
    older: dict[str, torch.Tensor] = {}
    for step in (10, 20):
        model = Transformer(RUN.model)
        model.init_weights(step)
        meta = SaveMeta(tokens=step * 16, config=RUN.model_dump(mode="json"), layout={"pp": 1, "dp": 1})
        extras = {TOKENIZER_FILE: ByteTokenizer().to_json().encode()}
        weights = weights_to_save(model.state_dict(), 0, Peers())
        # Its average: of the newer one, the weights of the older; so that it can be told from them.
        average = {name: tensor.float() for name, tensor in older.items()} if older else {}
        assert isinstance(store.save(step, Contribution(weights, extras=extras, ema=average), meta), Saved)
        older = weights
    return folder


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def call(*arguments: object) -> str:
    """Standard output of a command; its error is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def damage(run_dir: Path, step: int = 20) -> None:
    file = run_dir / "checkpoints" / f"step_{step:08d}" / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_ls_lists_the_newest_first(run_dir: Path) -> None:
    lines = call("checkpoint", "ls", run_dir).splitlines()
    assert [line.split()[0] for line in lines] == ["step_00000020", "step_00000010"]
    assert "320 tokens" in lines[0]
    assert [row["step"] for row in json.loads(call("checkpoint", "ls", run_dir, "--json"))] == [20, 10]


def test_verify_says_good_or_names_what_is_damaged(run_dir: Path) -> None:
    assert call("checkpoint", "verify", run_dir).splitlines() == [
        "step_00000020: good",
        "step_00000010: good",
    ]
    damage(run_dir)
    with pytest.raises(CheckpointError, match=r"step_00000020: weights-00000\.safetensors: expected sha256"):
        call("checkpoint", "verify", run_dir)
    assert call("checkpoint", "verify", run_dir / "checkpoints" / "step_00000010") == "step_00000010: good\n"


def test_show_says_what_a_checkpoint_holds(run_dir: Path) -> None:
    text = call("checkpoint", "show", run_dir)
    assert (
        "step 20, 320 tokens, 0 sequences, saved with pp 1, dp 1" in text
        and "weights-00000.safetensors" in text
    )
    fields = json.loads(call("checkpoint", "show", run_dir / "checkpoints" / "step_00000010", "--json"))
    assert fields["position"]["step"] == 10


def test_prune_keeps_the_newest_good_ones(run_dir: Path) -> None:
    damage(run_dir)
    assert call("checkpoint", "prune", run_dir, "--keep", "1") == ""
    assert len(list((run_dir / "checkpoints").iterdir())) == 2, "the only good one is the older one"
    damage(run_dir)  # the same bit again: good once more
    assert call("checkpoint", "prune", run_dir, "--keep", "1").endswith("step_00000010\n")


@pytest.mark.parametrize("command", ["ls", "verify", "show", "prune"])
def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(CheckpointError, match="got no checkpoint there"):
        call("checkpoint", command, tmp_path)


def test_generate_continues_a_prompt_repeatably(made: Path) -> None:
    options = ("generate", made / "run", "--prompt", "the ", "--max-tokens", 8, "--json")
    first, again = json.loads(call(*options, "--seed", 3)), json.loads(call(*options, "--seed", 3))
    assert first["tokens"] == again["tokens"] and len(first["tokens"]) <= 8
    assert first["step"] == 20 and first["prompt"] == "the "
    assert json.loads(call(*options, "--seed", 4))["tokens"] != first["tokens"]


def test_generate_prints_the_text_that_json_holds(made: Path) -> None:
    options = ("generate", made / "run", "--prompt", "the ", "--max-tokens", 8, "--temperature", 0)
    assert call(*options) == "the " + json.loads(call(*options, "--json"))["text"] + "\n"


def test_eval_and_generate_take_the_average_of_the_weights_if_asked(made: Path) -> None:
    newer, older = (made / "run" / "checkpoints" / f"step_{step:08d}" for step in (20, 10))
    measure = ("eval", "--data", made / "data", "--json")
    averaged = json.loads(call(*measure, newer, "--ema"))
    assert averaged["ema"] and averaged["loss"] == json.loads(call(*measure, older))["loss"]
    assert averaged["loss"] != json.loads(call(*measure, newer))["loss"]
    draw = ("generate", "--prompt", "the ", "--max-tokens", 8, "--json", "--seed", 3)
    tokens = json.loads(call(*draw, newer, "--ema"))["tokens"]
    assert tokens == json.loads(call(*draw, older))["tokens"]
    for command in (measure, draw):
        with pytest.raises(CheckpointError, match="expected averaged weights, got none"):
            call(*command, older, "--ema")


def test_generate_needs_neither_prompt_text_nor_the_data_folder(made: Path, run_dir: Path) -> None:
    assert "tokens" in json.loads(call("generate", run_dir, "--prompt", "", "--max-tokens", 2, "--json"))


def test_generate_falls_back_to_the_last_good_checkpoint(run_dir: Path) -> None:
    damage(run_dir)
    said = json.loads(call("generate", run_dir, "--prompt", "a", "--max-tokens", 1, "--json"))
    assert said["step"] == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "-1"), "--temperature: expected 0 or more, got -1.0"),
        (("--top-p", "0"), "--top-p: expected above 0 and at most 1, got 0.0"),
        (("--device", "tpu"), "--device: expected cpu or cuda, got tpu"),
    ],
)
def test_wrong_options_are_named(made: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call("generate", made / "run", "--prompt", "a", *options)


def test_eval_of_an_untrained_model_is_near_the_uniform_loss(made: Path) -> None:
    said = json.loads(call("eval", made / "run", "--data", made / "data", "--sequences", 8, "--json"))
    # Weights of standard deviation 0.2 leave the logits small against ln 264 = 5.6.
    assert abs(said["loss"] - math.log(264)) < 0.7
    assert said["tokens"] == 8 * RUN.batch.seq_len and said["step"] == 20
    # Bytes are tokens but for the ends of documents.
    expected = said["loss"] * said["tokens"] / math.log(2) / said["bytes"]
    assert said["bits_per_byte"] == pytest.approx(expected) and said["bytes"] > 0.9 * said["tokens"]
    assert said["perplexity"] == pytest.approx(math.exp(said["loss"]))


def test_eval_agrees_with_cross_entropy_over_all_logits(made: Path) -> None:
    from moe_runtime.checkpoint.load import load_model
    from moe_runtime.data.loader import VALIDATION_SEED, BatchLoader
    from moe_runtime.data.shards import TokenDataset

    said = json.loads(call("eval", made / "run", "--data", made / "data", "--sequences", 7, "--json"))
    loader = BatchLoader(
        TokenDataset.open(made / "data", "validation"), RUN.batch.seq_len, 1, VALIDATION_SEED
    )
    rows = loader.sequences(0, 7)
    model = load_model(made / "run", dtype=torch.float64)
    with torch.no_grad():
        logits = model(rows[:, : RUN.batch.seq_len])
    slow = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1 : RUN.batch.seq_len + 1].flatten()
    )
    assert said["loss"] == pytest.approx(float(slow), rel=1e-5)  # FP32 against FP64


def test_eval_refuses_data_of_another_tokenizer(made: Path, tmp_path: Path) -> None:
    prepare(Request(f"dir:{made / 'texts'}", "bpe:265", 0, 0.0, 0.3), tmp_path / "other")
    with pytest.raises(DataError, match="expected ids of the tokenizer that"):
        call("eval", made / "run", "--data", tmp_path / "other")
