"""The ladder of run configs: each rung says what it is planned to take, as the planner says it today."""

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from tests.arch.sources import ROOT

_HEAD = "# Plan, by moe-runtime "
_LADDER = {"quickstart": 4, "small": 1, "medium": 8, "v3_16b": 32, "v3_671b": 2048}


@pytest.mark.parametrize("name", _LADDER)
def test_the_plan_in_a_config_is_what_its_command_prints(name: str) -> None:
    lines = (ROOT / "configs" / "run" / f"{name}.yaml").read_text().splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(_HEAD))
    words = lines[begin].removeprefix(_HEAD).rstrip(":").split()
    assert words[:2] == ["plan", name]
    said = CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()
    assert lines[begin : begin + len(said)] == said, f"put what `moe-runtime {' '.join(words)}` prints there"
    assert not lines[begin + len(said)].startswith("#   "), "a line of an older plan is left"


@pytest.mark.parametrize(("name", "ranks"), _LADDER.items())
def test_a_rung_is_for_as_many_processes_as_it_says(name: str, ranks: int) -> None:
    assert check_layout(load_config(name)).world_size == ranks
