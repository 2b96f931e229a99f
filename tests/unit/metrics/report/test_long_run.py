"""A run of 100,000 steps and 58 MoE layers of 256 experts: a small report, and nothing extreme is lost."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE, read_heatmap
from moe_runtime.metrics.report.html import page
from moe_runtime.metrics.report.run_view import RunView
from tests.cli.browser import DRAWN, browser, open_page
from tests.unit.metrics.report.made_run import make_run
from tests.unit.metrics.report.read_page import Page

pytestmark = pytest.mark.slow

STEPS, LAYERS, EXPERTS = 100_000, 58, 256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "long"
    return make_run(
        folder, STEPS, LAYERS, EXPERTS, layers_every=100, heatmap_every=10, dead=(31, 200, 60_000)
    )


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    view = RunView(run)
    view.look()
    return page(view, run)


def test_its_report_takes_less_than_6_mb(text: str) -> None:
    assert len(text.encode()) < 6_000_000


def test_extremes_stay_at_their_steps_to_the_digit(run: Path, text: str) -> None:
    losses, nested = {}, {}
    for line in (run / METRICS_FILE).open():
        record = json.loads(line)
        losses[record["step"]] = record["loss"]
        nested[record["step"]] = record["routing"]["violation"]["max"]
    own = Page(text)
    for key, seen in (("loss", losses), ("routing/violation/max", nested)):
        curve = own.curve(key)
        assert all(seen[step] == value for step, value in curve.items())
        for choose in (min, max):
            step = choose(seen, key=lambda step: seen[step])
            assert curve[int(step)] == seen[step]
        assert curve[STEPS] == seen[STEPS]


def test_the_dead_expert_is_named_from_the_time_it_died(run: Path, text: str) -> None:
    heatmap = read_heatmap(run / HEATMAP_FILE)
    since = next(step for step in heatmap.steps if step >= 60_000)
    words = " ".join(" ".join(Page(text).text).split())
    assert f"layers.32 200 {since:,}" in words
    load = Page(text).data["load"]
    assert load["experts"] == EXPERTS and len(load["layers"]) == LAYERS
    assert np.all(np.diff(load["firstSteps"]) > 0)


def test_a_browser_draws_all_of_it(run: Path, text: str) -> None:
    out = run / "report.html"
    out.write_text(text)
    with browser() as opened:
        watched = open_page(opened, out.as_uri(), viewport={"width": 1400, "height": 900})
        watched.page.wait_for_selector(DRAWN, state="attached")
        opened_ms = float(watched.page.get_attribute("body", "data-opened"))
        print(f"what is in sight was drawn after {opened_ms:.0f} ms")
        assert watched.said == [] and watched.asked == [out.as_uri()]
        shown = watched.page.locator("figure[data-plot]:not([hidden])").count()
        assert watched.page.locator("figure[data-plot]:not([hidden]) .plot > *").count() >= shown > 50
