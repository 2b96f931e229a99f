"""The page: what is recorded is in it to the digit, and nothing that a run wrote becomes part of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.metrics.files import EVENTS_FILE, METRICS_FILE
from moe_runtime.metrics.line import paths
from moe_runtime.metrics.report.html import page
from moe_runtime.metrics.report.run_view import RunView
from tests.unit.metrics.report.made_run import make_run
from tests.unit.metrics.report.read_page import Page, addresses

pytest.importorskip("bokeh", reason="bokeh draws the report: pip install 'moe_runtime[report]'")

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> ' \" & "
HOSTILE += "\u202e \x1b[31m \ud800"


def _page(run_dir: Path) -> str:
    view = RunView(run_dir)
    view.look()
    return page(view, run_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = make_run(tmp_path_factory.mktemp("run"), dead=(1, 3, 25))
    return run_dir, _page(run_dir)


def test_every_number_of_metrics_jsonl_is_in_the_page_to_the_bit(run: tuple[Path, str]) -> None:
    own = Page(run[1])
    seen: dict[str, dict[int, float]] = {}
    for line in (run[0] / METRICS_FILE).read_text().splitlines():
        record = json.loads(line)
        for key, value in paths({name: value for name, value in record.items() if name != "layers"}):
            if isinstance(value, int | float):
                seen.setdefault(key, {})[record["step"]] = float(value)
    assert seen.keys() == own.data["curves"].keys()
    assert not [key for key, points in seen.items() if own.curve(key) != points]


def test_the_summary_says_what_was_recorded_last_to_the_digit(run: tuple[Path, str]) -> None:
    last = json.loads((run[0] / METRICS_FILE).read_text().splitlines()[-1])
    values = Page(run[1]).values
    assert values[f"{last['loss']!r} · loss, last, step 40"] == repr(last["loss"])
    assert values[f"{last['tokens_per_s']!r} · tokens_per_s, last, step 40"] == repr(last["tokens_per_s"])
    assert "1 · below 1% of a fair share at step 40, the newest in expert_load.jsonl" in values


def test_without_a_script_every_picture_that_has_data_is_there_in_words(run: tuple[Path, str]) -> None:
    figures = {
        tag.split('data-plot="')[1].split('"')[0]: tag.endswith(" hidden")
        for tag in re.findall(r"<figure[^>]*(?=>)", run[1])
    }
    assert {name for name, hidden in figures.items() if not hidden} == Page(run[1]).data["plots"].keys()
    assert "loss" in figures and ".words { position: static" in run[1].split("<noscript>")[1]


def test_checkpoints_that_no_record_follows_are_told_from_the_events(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps=10)
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    kept = [{key: line[key] for key in ("step", "loss")} for line in lines]
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in kept))
    own = Page(_page(run_dir))
    assert own.values["0.01 · blocked_s in events.jsonl"] == "0.01"
    assert own.values["10 · events.jsonl"] == "10"
    text = " ".join(" ".join(own.text).split())
    assert (
        "Age of the newest checkpoint" in text and "those after the last step are told in the summary" in text
    )


def test_the_page_names_the_dead_expert_and_since_when(run: tuple[Path, str]) -> None:
    text = " ".join(Page(run[1]).text)
    assert "1 expert gets less than 1% of a fair share at step 40" in " ".join(text.split())
    load = Page(run[1]).data["load"]
    assert load["layers"] == ["layers.1", "layers.2", "layers.3"] and len(load["lastSteps"]) == 40


def test_nothing_outside_is_named_and_every_link_leads_somewhere(run: tuple[Path, str]) -> None:
    assert addresses(run[1]) == []
    own = Page(run[1])
    assert own.mistakes == [] and len(own.ids) == len(set(own.ids))
    for link in own.links:
        is_step = link.startswith("#step-")
        assert is_step or (link[1:] in own.ids if link[0] == "#" else (run[0] / link).is_file()), link


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a <b> & 'c'", steps=3)
    with (run_dir / EVENTS_FILE).open("a") as file:
        for kind in ("sample", "alert", HOSTILE):
            event = {
                "time": HOSTILE,
                "kind": kind,
                "step": 2,
                "text": HOSTILE,
                "message": HOSTILE,
                HOSTILE: HOSTILE,
            }
            file.write(json.dumps(event) + "\n")
    with (run_dir / METRICS_FILE).open("a") as file:
        numbers = {"step": 4, "loss": 1.0, HOSTILE: 2.0, "layers": {HOSTILE: {HOSTILE: 1.0}}}
        file.write(json.dumps(numbers | {"val_sets": {HOSTILE: {"val_bpb": 1.0}}}) + "\n")
    (run_dir / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n{HOSTILE[:-1]}")
    text = _page(run_dir)
    own = Page(text)
    assert own.mistakes == [] and text.count("<script") == 3 and "<img" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "<script>document.title='taken'</script>" in "".join(own.text)


@pytest.mark.parametrize(
    "kept", [(), (METRICS_FILE,), (EVENTS_FILE,), ("expert_load.jsonl",), ("trace.json",)]
)
def test_a_run_folder_that_has_only_begun_has_a_page(kept: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps=2)
    for path in run_dir.iterdir():
        if path.name not in kept:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-200])  # and what there is ends in the middle of a line
    own = Page(_page(run_dir))
    assert own.mistakes == [] and "Summary" in own.text


def test_more_samples_and_events_than_have_room_are_counted(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps=2)
    with (run_dir / EVENTS_FILE).open("a") as file:
        for step in range(1000):
            file.write(
                json.dumps({"time": "t", "kind": "sample", "step": step, "text": f"text {step}"}) + "\n"
            )
            file.write(
                json.dumps({"time": "t", "kind": "warning", "step": step, "message": f"note {step}"}) + "\n"
            )
    text = " ".join("".join(Page(_page(run_dir)).text).split())
    assert "text 0" in text and "text 999" in text and "960 more samples" in text
    assert "note 999" in text and "701 older events" in text


def test_a_thousand_steps_take_less_than_2_5_mb(tmp_path: Path) -> None:
    text = _page(make_run(tmp_path / "run", steps=1000, layers=4))
    assert len(text.encode()) < 2_500_000
    assert len(np.unique([*Page(text).curve("loss")])) == 1000  # and no point of them is left out
