"""The report in a real browser: every picture is there, it follows the run, and nothing goes outside."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.report.html import page
from moe_runtime.metrics.report.run_view import RunView
from moe_runtime.metrics.report.serve import open_server
from tests.cli.browser import DRAWN, Watched, browser, open_page
from tests.unit.metrics.report.made_run import make_run

_FEW = (
    "step",
    "tokens",
    "loss",
    "val_loss",
    "lr",
    "routing",
    "layers",
    "exposed_comm_fraction",
    "memory_peak_gb",
)
# Colours in the middle of every picture that is shown: an empty one has a single one.
_COLOURS = """
() => [...document.querySelectorAll("figure[data-plot]:not([hidden])")].map((figure) => {
  const canvases = [];
  const look = (root) => {
    canvases.push(...root.querySelectorAll("canvas"));
    for (const each of root.querySelectorAll("*")) if (each.shadowRoot) look(each.shadowRoot);
  };
  look(figure.querySelector(".plot"));
  const colours = new Set();
  for (const canvas of canvases) {
    const {width, height} = canvas;
    if (!width || !height) continue;
    const cells = canvas.getContext("2d").getImageData(0, 0, width, height).data;
    for (let place = 0; place < cells.length; place += 4) {
      if (cells[place + 3]) colours.add(cells[place] << 16 | cells[place + 1] << 8 | cells[place + 2]);
    }
  }
  return [figure.dataset.plot, colours.size];
})
"""


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with few pictures: each takes a browser a tenth of a second."""
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "made", steps=40, dead=(1, 3, 25))
    lines = (run_dir / METRICS_FILE).read_text().splitlines()
    kept = [{key: value for key, value in json.loads(line).items() if key in _FEW} for line in lines]
    for record in kept:
        record["routing"] = {"violation": record["routing"]["violation"]}
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in kept))
    return run_dir


def _written(run_dir: Path) -> str:
    view = RunView(run_dir)
    view.look()
    out = run_dir / "report.html"
    out.write_text(page(view, run_dir))
    return out.as_uri()


def _check_quiet(watched: Watched, address: str) -> None:
    assert watched.said == []
    assert [url for url in watched.asked if not url.startswith((address, "blob:", "data:"))] == []


def test_every_picture_is_drawn_and_nothing_is_asked_for(opened: Any, run: Path) -> None:
    address = _written(run)
    watched = open_page(opened, address, viewport={"width": 1200, "height": 800})
    watched.page.wait_for_selector(DRAWN, state="attached")
    drawn = dict(watched.page.evaluate(_COLOURS))
    assert {"loss", "load-by-expert", "load-over-time", "layer-numbers", "pipeline-measured"} <= drawn.keys()
    assert not [name for name, colours in drawn.items() if colours < 4]
    _check_quiet(watched, address)
    assert watched.asked == [address]
    _check_links_and_keys(watched.page)
    _check_paper(watched.page)
    watched.page.context.close()


def test_without_javascript_words_and_numbers_stand_for_the_pictures(opened: Any, run: Path) -> None:
    watched = open_page(opened, _written(run), java_script_enabled=False)
    loss = watched.page.locator("#panel-loss")
    assert loss.locator(".words").is_visible() and "loss from" in loss.locator(".words").inner_text()
    assert loss.locator(".plot").is_hidden()
    loss.locator("summary").click()
    assert loss.locator("table").is_visible()
    assert "needs JavaScript" in watched.page.locator("#panel-load-by-expert").inner_text()
    watched.page.context.close()


def test_a_lone_point_is_whole_and_paper_has_words_for_what_is_not_drawn(opened: Any, run: Path) -> None:
    watched = open_page(opened, _written(run))
    page = watched.page
    page.wait_for_selector(DRAWN, state="attached")
    lone = """([id, key]) => {
      const {x, y} = report.curves.get(key);
      report.curves.set(key, {x: x.slice(-1), y: y.slice(-1)});
      const entry = report.drawn.get(id);
      entry.plot.curves = entry.plot.curves.filter(([each]) => each === key);
      fillLines(entry);
      const points = entry.figure.renderers.at(-1);
      return [entry.figure.x_range.end, points.visible, points.glyph.size.value];
    }"""
    end, visible, size = page.evaluate(lone, ["learning-rate", "lr"])
    assert end > 41 and visible and size == 9
    page.emulate_media(media="print")
    assert page.locator("#words-loss").bounding_box()["width"] == 1
    page.evaluate("forget('loss')")
    assert page.locator("#words-loss").bounding_box()["width"] > 100
    watched.page.context.close()


def _check_links_and_keys(page: Any) -> None:
    """What a person does: a step of an event, one curve away, the theme, all by the keyboard."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.locator("#section-events a.at").first.press("Enter")
    page.wait_for_timeout(100)
    assert page.locator("#from").input_value() == "30" and page.locator("#to").input_value() == "40"
    page.locator("#all").press("Enter")
    assert page.locator("#from").input_value() == "1"
    curve = page.locator("#legend-loss button").first
    curve.press("Space")
    assert curve.get_attribute("aria-pressed") == "false"
    figures = "report.drawn.get('loss').figure.renderers"
    assert page.evaluate(f"{figures}[1].visible") is False and page.evaluate(f"{figures}[2].visible") is True
    page.locator("#theme").press("Enter")
    page.locator("#theme").press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.locator("#panel-loss summary").press("Enter")
    page.locator("#panel-loss .all-points").press("Enter")
    assert page.locator("#panel-loss .all-points-table tbody tr").count() == 40


def _check_paper(page: Any) -> None:
    """Printing lays the pictures out for paper, light, and then they are as before."""
    width = "report.drawn.get('loss').figure.outer_width"
    before = page.evaluate(width)
    page.evaluate("window.print = () => dispatchEvent(new Event('afterprint'))")
    page.evaluate("toPaper(true)")
    assert page.evaluate(width) < before
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.locator("#print").click()
    page.wait_for_selector("html:not(.on-paper)", state="attached")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_live_page_takes_in_new_steps_where_the_person_is(opened: Any, run: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(run, tmp_path / "live"))
    lines = (run_dir / METRICS_FILE).read_text().splitlines(keepends=True)
    (run_dir / METRICS_FILE).write_text("".join(lines[:18]))
    with open_server(run_dir, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            watched = open_page(opened, server.address, viewport={"width": 390, "height": 700})
            _check_live(watched, run_dir, lines)
            _check_quiet(watched, server.address)
            watched.page.context.close()
        finally:
            server.shutdown()
            thread.join()


def _check_live(watched: Watched, run_dir: Path, lines: list[str]) -> None:
    page = watched.page
    page.wait_for_selector(DRAWN, state="attached")
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth"
    )  # nothing sticks out of a phone
    assert page.locator("#panel-validation-bits-per-byte").is_hidden()
    page.locator("#panel-loss summary").click()
    page.evaluate("setRange([5, 12])")
    page.locator("#section-samples").scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    before = page.evaluate("document.querySelector('#section-samples').getBoundingClientRect().top")
    with (run_dir / METRICS_FILE).open("a") as file:
        file.write("".join(lines[18:]) + '{"step": 41, "val_bpb": 1.25, "torn')
    page.wait_for_selector("#summary data[title='40']", state="attached")
    page.wait_for_timeout(100)
    after = page.evaluate("document.querySelector('#section-samples').getBoundingClientRect().top")
    assert abs(after - before) < 40
    loss = "report.drawn.get('loss').figure"
    assert page.evaluate(f"[{loss}.x_range.start, {loss}.x_range.end]") == [5, 12]
    assert page.evaluate(f"{loss}.renderers[1].data_source.data.x.length") == 40
    assert page.locator("#panel-loss details").get_attribute("open") is not None
    page.evaluate("setRange(null)")
    assert page.evaluate(f"{loss}.x_range.end") == 40
