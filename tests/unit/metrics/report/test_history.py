"""metrics.jsonl as curves, in whatever state the file is."""

import json
import math
from pathlib import Path

import numpy as np

from moe_runtime.metrics.report.history import History
from tests.unit.metrics.report.made_run import records

Fields = dict[str, object]


def _line(step: int, loss: float | None = 1.5, **more: object) -> str:
    return json.dumps({"step": step, "tokens": step * 10, "loss": loss, **more}) + "\n"


def _losses(history: History) -> dict[int, float]:
    steps, values = history.curves["loss"].points()
    return dict(zip(map(int, steps), values.tolist(), strict=True))


def _read(path: Path) -> History:
    history = History(path)
    history.look()
    return history


def test_a_run_without_metrics_has_no_curves(tmp_path: Path) -> None:
    history = _read(tmp_path / "metrics.jsonl")
    assert (history.curves, history.last_step, history.torn) == ({}, 0, 0)


def test_nested_numbers_are_curves_and_layers_are_a_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    made = list(records(5, ["layers.1", "mtp.0.block"], layers_every=2))
    path.write_text("".join(json.dumps(record) + "\n" for record in made))
    history = _read(path)
    steps, values = history.curves["routing/violation/max"].points()
    assert values.tolist() == [record["routing"]["violation"]["max"] for record in made]
    assert not [key for key in history.curves if key.startswith("layers")]
    steps, table = history.layers.table()
    assert steps.tolist() == [2, 4] and history.layers.layers == ["layers.1", "mtp.0.block"]
    name = history.layers.names.index("bias_std")
    expected = [record["layers"]["mtp.0.block"]["bias_std"] for record in made if "layers" in record]
    np.testing.assert_array_equal(table[name, 1], np.float32(expected))


def test_a_line_that_is_half_written_waits_and_a_torn_one_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1) + '{"step": 2, "lo\n[3]\n{"step": "x"}\n' + _line(4) + _line(5)[:-9])
    history = _read(path)
    assert (list(_losses(history)), history.torn) == ([1, 4], 3)
    with path.open("a") as file:
        file.write(_line(5)[-9:])
    history.look()
    assert (list(_losses(history)), history.torn) == ([1, 4, 5], 3)


def test_null_is_a_gap_and_huge_whole_numbers_are_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1, None, other=10**400, deep={"a": {"b": {"c": {"d": {"e": 1}}}}}) + _line(2, 2.5))
    history = _read(path)
    assert math.isnan(_losses(history)[1]) and history.curves["loss"].stats.num_bad == 1
    assert math.isnan(history.curves["other"].points()[1][0])


def test_a_resume_that_cuts_the_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_line(step, float(step)) for step in range(1, 11)))
    history = _read(path)
    # Cut to step 6 and gone on with until it is longer than before, between two looks.
    path.write_text("".join(_line(step, float(step) if step <= 6 else -float(step)) for step in range(1, 15)))
    history.look()
    fresh = _read(path)
    assert _losses(history) == _losses(fresh) and _losses(history)[9] == -9.0
    assert history.replaced == 0


def test_of_repeated_steps_the_later_line_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_line(step, 1.0) for step in range(1, 9)))
    history = _read(path)
    with path.open("a") as file:
        file.write("".join(_line(step, 2.0) for step in range(5, 8)))
    history.look()
    expected = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0}
    assert _losses(history) == expected and history.replaced == 4
    assert _losses(_read(path)) == expected


def test_reading_bit_by_bit_is_reading_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    history = History(path)
    text = "".join(_line(step, math.sin(step)) for step in range(1, 2000))
    for start in range(0, len(text), 7001):
        with path.open("a") as file:
            file.write(text[start : start + 7001])
        history.look()
    fresh = _read(path)
    for key in fresh.curves:
        for own, other in zip(history.curves[key].points(), fresh.curves[key].points(), strict=True):
            np.testing.assert_array_equal(own, other)
