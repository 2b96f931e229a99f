"""`plan --search` and `plan --page` as a user types them."""

import json
import re
from pathlib import Path

import pytest

from moe_runtime.cli.plan.page import page
from moe_runtime.cli.plan.searching import describe_search, search_fields, winner_of, write_winner
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.reckon.layouts import Search, search_layouts
from moe_runtime.planner.reckon.plan import plan
from moe_runtime.planner.reckon.scale import at_scales
from tests.cli.small_run import run

SCALED = ("batch.global_batch_size=64", "batch.micro_batch_size=1")  # lanes of 4 to 32 microbatches
SMALL = ("batch.global_batch_size=8", "batch.micro_batch_size=1")


@pytest.fixture(scope="module")
def found() -> Search:
    return search_layouts(load_config("quickstart", SMALL), load_cluster("h800"), 4)


def test_the_winners_config_is_a_run_of_its_size(found: Search, tmp_path: Path) -> None:
    written = load_config(write_winner(found, tmp_path / "deep" / "best.yaml"))
    assert written == found.ranked[0].candidate.config
    assert check_layout(written, 4).world_size == 4


def test_tables_name_the_winner_and_count_every_layout(found: Search) -> None:
    text, layout = describe_search(found), found.ranked[0].candidate.frame.layout
    assert f"{found.num_legal + found.num_refused:,} layouts" in text and layout.schedule in text
    assert "dualpipe needs an even pp" in text and "such as layout.pp=" in text


def test_values_hold_every_layout(found: Search) -> None:
    fields = json.loads(json.dumps(search_fields(found)))
    assert len(fields["ranked"]) + len(fields["too_large"]) == fields["legal"] == found.num_legal
    assert fields["ranked"][0]["step_s"] == found.ranked[0].seconds
    assert all(one["reason"] for one in (*fields["refused"], *fields["too_large"]))


def test_a_model_larger_than_the_cluster_is_refused_with_what_it_needs() -> None:
    layout = ("layout.pp=1", "layout.dp=32", "layout.ep=32", "layout.schedule=single")
    batch = ("batch.global_batch_size=64", "batch.ramp_start_size=null", "batch.ramp_tokens=0")
    run = load_config("v3_671b", (*layout, *batch))
    with pytest.raises(ConfigError, match=r"weights alone take 1,365\.3 GB"):
        search_layouts(run, load_cluster("h800"), 2)
    found = search_layouts(run, load_cluster("h800"), 32)
    with pytest.raises(ConfigError, match=r"fits into 84\.9 GB, got none .* needs [\d,.]+ GB"):
        winner_of(found)
    assert "need more memory than there is" in describe_search(found)


def test_no_legal_layout_is_said_with_the_reasons() -> None:
    found = search_layouts(load_config("quickstart", SMALL), load_cluster("h800"), 7)
    with pytest.raises(ConfigError, match="expected a legal layout, got none of"):
        winner_of(found)


def test_a_page_shows_the_plan_and_needs_nothing_else() -> None:
    config, cluster = load_config("quickstart", SCALED), load_cluster("h800")
    text = page(plan(config, cluster), at_scales(config, cluster))
    assert text.count("<svg") == 6  # memory, phases, timeline, wall time, cost, sensitivity
    assert text.count("<html") == text.count("</html>") == 1
    assert not re.search(r"<script|<link|src=|url\(|@import", text)
    for said in (
        "Plan of quickstart on h800",
        "Memory of each pipeline rank",
        "Cost against scale",
        "bubble",
    ):
        assert said in text


def test_more_lanes_take_fewer_days() -> None:
    scales = at_scales(load_config("quickstart", SCALED), load_cluster("h800"))
    assert len(scales) > 2
    assert [one.accelerators for one in scales] == sorted(one.accelerators for one in scales)
    days = [one.days for one in scales]
    assert days == sorted(days, reverse=True)


@pytest.mark.launcher
def test_the_command_searches_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    code, output = run("plan", "quickstart", *SMALL, "--search", "--gpus", "2", "--write", str(file))
    assert code == 0, output
    assert str(file) in output and load_config(file).layout.pp * load_config(file).layout.dp == 2
    code, output = run("plan", "quickstart", "--gpus", "2")
    assert code == 2 and "expected --search" in output
