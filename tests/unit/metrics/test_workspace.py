"""The dashboard as code: built without a network, and saved to a stand-in for W&B's server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, SECTIONS, TIMELINE
from moe_runtime.metrics.panels import PANELS
from moe_runtime.metrics.workspace import regex_of
from tests.unit.metrics.wandb_server import wandb_server
from tests.workspace_keys import shown_keys

pytestmark = [
    pytest.mark.usefixtures("no_wandb_account"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of wandb_workspaces itself
]


def dashboard(*arguments: object) -> str:
    words = ["dashboard", *(str(each) for each in arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def sections_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["section"]["panelBankConfig"]["sections"]
    return found


def test_the_workspace_has_every_panel_in_order_and_says_how_to_read_it(tmp_path: Path) -> None:
    file = tmp_path / "workspace.json"
    assert dashboard("--json", file, "--project", "p", "--entity", "e") == ""
    made = json.loads(file.read_text())
    assert (made["entity"], made["project"]) == ("e", "p")
    sections = sections_of(made["spec"])
    assert [section["name"] for section in sections] == list(SECTIONS)
    patterns, media = shown_keys(made)
    assert patterns == {regex_of([key]) for panel in PANELS if panel.kind == "lines" for key in panel.keys}
    assert media == {SAMPLES, ALERTS, HEATMAP, TIMELINE}
    for section in sections:
        text = section["panels"][0]["config"]["value"]
        titles = [panel.title for panel in PANELS if panel.section == section["name"]]
        assert re.findall(r"^- \*\*(.*)\*\*: ", text, re.MULTILINE) == titles
    assert dashboard("--json", "-", "--project", "p", "--entity", "e") == file.read_text(), (
        "the same each time"
    )


def test_of_a_run_only_what_it_emits_is_shown(told: Path) -> None:
    made = json.loads(dashboard(told, "--json", "-"))
    assert made["project"] == "told"
    titles = {
        panel["config"].get("chartTitle")
        for section in sections_of(made["spec"])
        for panel in section["panels"][1:]
    }
    assert {"Loss", "Load violation", "Expert load, layer by expert"} <= titles
    assert not {"FP8 scales", "Time of a checkpoint"} & titles


def test_a_workspace_is_saved_to_the_entity_of_the_key_and_replaced_where_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with wandb_server() as views:
        monkeypatch.setenv("WANDB_BASE_URL", views.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        url = dashboard("--project", "p").strip()
        assert url == f"{views.url}/somebody/p?nw=abc"
        assert dashboard("--project", "p", "--update", url).strip() == url
        first, second = views.saved
    assert first["entityName"] == "somebody" and first["projectName"] == "p" and "id" not in first
    assert second["id"] == "view-1" and second["displayName"] == "old"
    names = [section["name"] for section in sections_of(json.loads(second["spec"]))]
    assert names == list(SECTIONS)


def test_without_a_key_or_a_server_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"no API key of W&B: set WANDB_API_KEY .* --json FILE needs no server"
    ):
        dashboard()
    with pytest.raises(ConfigError, match=r"--json: .*/none/f cannot be written \(No such file"):
        dashboard("--json", tmp_path / "none" / "f")
    with pytest.raises(ConfigError, match="--update: saves to W&B and --json does not"):
        dashboard("--json", "-", "--update", "https://wandb.ai/a/b?nw=c")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        dashboard(tmp_path, "--json", "-")


def test_patterns_are_exact() -> None:
    regex = re.compile(regex_of(["val_bpb", "val_sets/*/val_bpb"]))
    assert regex.search("val_sets/my.set-1/val_bpb") and regex.search("val_bpb")
    assert not regex.search("val_sets/a/b/val_bpb") and not regex.search("my_val_bpb")
