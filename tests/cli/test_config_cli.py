"""`moe-runtime config`: show, diff, keys and schema as a user calls them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.cli.launch import main as launch
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.errors import ConfigError


def call(*arguments: object) -> str:
    """Standard output of `config ...`; its error is raised."""
    words = ["config", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_show_prints_is_a_config_of_the_same_run(tmp_path: Path) -> None:
    shown = call("show", "quickstart", "optim.eps=1e-7")
    (tmp_path / "run.yaml").write_text(shown)
    run = load_config("quickstart", ["optim.eps=1e-7"])
    assert load_config(tmp_path / "run.yaml") == run
    assert json.loads(call("show", "quickstart", "optim.eps=1e-7", "--json"))["config"] == run.model_dump(
        mode="json"
    )


def test_show_where_names_the_line_of_every_value() -> None:
    rows = {
        line.split()[0]: line.split() for line in call("show", "quickstart", "seed=5", "--where").splitlines()
    }
    assert rows["seed"] == ["seed", "5", "override"]
    assert rows["model.num_layers"][2].startswith("configs/model/tiny.yaml:")
    assert rows["guard.max_skips"][2] == "default"
    places = json.loads(call("show", "quickstart", "--where", "--json"))["where"]
    assert set(places) == set(rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quickstart", "quickstart"], []),
        (["quickstart", "seed=7"], ["seed: 1234 -> 7"]),
        (["quickstart", "seed=7", "quickstart"], ["seed: 7 -> 1234"]),
        (
            ["quickstart", "seed=7", "quickstart", "seed=8", "optim.eps=1e-7"],
            ["seed: 7 -> 8", "optim.eps: 1e-08 -> 1e-07"],
        ),
    ],
)
def test_diff_compares_configs_each_with_its_overrides(words: list[str], expected: list[str]) -> None:
    assert call("diff", *words).splitlines() == expected


def test_diff_compares_a_run_folder_with_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "odd=name"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config("quickstart", ["train.total_steps=3"])))
    assert json.loads(call("diff", folder, "quickstart", "--json")) == {"train.total_steps": [3, 160]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quickstart"], "expected two configs, or one with overrides, got quickstart"),
        (["seed=1", "quickstart"], "expected a config before its overrides, got seed=1"),
        (["quickstart", "small", "calibrate"], "got quickstart, small, calibrate"),
        (["quickstart", "quikstart"], "did you mean quickstart?"),
    ],
)
def test_diff_says_what_it_lacks(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call("diff", *words)
    assert says in str(caught.value)


def test_keys_are_one_a_line_or_json() -> None:
    lines = call("keys", "recompute").splitlines()
    assert " ".join(lines[0].split()) == (
        "recompute.norm true or false; default false. outputs of every RMSNorm"
    )
    (key, *_) = json.loads(call("keys", "layout.schedule", "--json"))
    assert key["name"] == "layout.schedule" and "dualpipe" in key["choices"] and key["default"] == "auto"
    assert len(call("keys").splitlines()) > 150


def test_the_schema_goes_to_a_file_and_says_how_an_editor_finds_it(tmp_path: Path) -> None:
    out = tmp_path / "schema.json"
    result = CliRunner().invoke(app, ["config", "schema", "--out", str(out)])
    assert result.exit_code == 0 and "# yaml-language-server: $schema=" in result.stderr
    assert json.loads(out.read_text()) == json.loads(call("schema"))
    assert "bases" not in json.loads(call("schema", "--resolved"))["properties"]
    with pytest.raises(ConfigError, match="cannot be written"):
        call("schema", "--out", tmp_path / "none" / "schema.json")


def test_an_alert_on_what_no_record_has_is_refused_by_show_and_before_ranks_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = "alerts.custom=[{name: x, metric: lss, above: 3}]"
    with pytest.raises(ConfigError, match=r"alerts\.custom\.0\.metric: .* got 'lss'; did you mean loss\?"):
        call("show", "quickstart", wrong)
    assert launch(["train", "quickstart", wrong]) == 2
    assert "did you mean loss?" in capsys.readouterr().err
