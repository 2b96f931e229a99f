"""The file of expert loads: what is written is read, few lines whatever the run's length."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.metrics.heatmap import MOST_LINES, HeatmapWriter, interval_at, is_due, read_heatmap

LAYERS = ["layers.1", "layers.2", "mtp.0.block"]


def load_of(step: int) -> np.ndarray:
    table = np.random.default_rng(step).random((3, 8))
    return table * 8 / table.sum(axis=1, keepdims=True)


def run(path: Path, begin: int, end: int, every: int) -> None:
    writer = HeatmapWriter(path, LAYERS, every, keep_to_step=begin)
    for step in range(begin + 1, end + 1):
        if is_due(step, every):
            assert writer.add(step, load_of(step)) is None
    writer.close()


def test_what_is_written_is_read_within_half_a_code(tmp_path: Path) -> None:
    run(tmp_path / "f", 0, 35, 10)
    steps, layers, load = read_heatmap(tmp_path / "f")
    assert (steps, layers, load.dtype) == ([10, 20, 30], LAYERS, np.float32)
    expected = np.stack([load_of(step) for step in steps])
    assert np.abs(load - expected).max() <= 0.5 / 256 + 1e-6


def test_a_dead_expert_is_zero_and_the_busiest_possible_one_is_kept(tmp_path: Path) -> None:
    writer = HeatmapWriter(tmp_path / "f", ["layers.1"], 1)
    writer.add(1, [[0.0, 32.0] + [1.0] * 6])
    writer.close()
    assert read_heatmap(tmp_path / "f").load[0, 0].tolist() == [0.0, 32.0] + [1.0] * 6


@pytest.mark.parametrize("end", [999, 1000, 1001, 2000, 2001, 9000])
def test_a_run_of_any_length_has_few_lines_evenly_over_it(tmp_path: Path, end: int) -> None:
    run(tmp_path / "f", 0, end, 1)
    steps = read_heatmap(tmp_path / "f").steps
    interval = interval_at(steps[-1], 1)
    assert steps == list(range(interval, steps[-1] + 1, interval)) and end - steps[-1] < 2 * interval
    assert min(end, MOST_LINES // 2) <= len(steps) <= MOST_LINES


@pytest.mark.parametrize("stops", [(7, 7), (700, 650), (1500, 1400), (1001, 1000), (2100, 900)])
def test_a_resumed_run_has_the_file_of_one_that_was_never_stopped(
    tmp_path: Path, stops: tuple[int, int]
) -> None:
    run(tmp_path / "whole", 0, 2500, 1)
    run(tmp_path / "parts", 0, stops[0], 1)
    run(tmp_path / "parts", stops[1], 2500, 1)
    whole, parts = read_heatmap(tmp_path / "whole"), read_heatmap(tmp_path / "parts")
    assert (whole.steps, whole.layers) == (parts.steps, parts.layers)
    assert np.array_equal(whole.load, parts.load)


def test_a_roll_back_takes_later_lines_out(tmp_path: Path) -> None:
    writer = HeatmapWriter(tmp_path / "f", LAYERS, 1)
    for step in range(1, 6):
        writer.add(step, load_of(step))
    writer.roll_back(0)
    writer.add(1, load_of(9))
    writer.close()
    steps, layers, load = read_heatmap(tmp_path / "f")
    assert (steps, layers) == ([1], LAYERS)
    assert np.abs(load[0] - load_of(9)).max() < 0.01


def test_torn_damaged_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "f"
    run(path, 0, 3, 1)
    lines = path.read_text().splitlines()
    damaged = json.loads(lines[1]) | {"load": "!!"}
    foreign = json.loads(lines[0]) | {"layers": ["layers.9"], "experts": 24}
    again = json.loads(lines[2]) | {"layers": LAYERS, "step": 5}
    path.write_text(
        "\n".join([lines[0], json.dumps(damaged), lines[2], json.dumps(foreign), json.dumps(again)])
    )
    with path.open("a") as file:
        file.write('\n{"step": 6, "load"')
    assert read_heatmap(path).steps == [1, 3, 5]


def test_no_file_is_an_empty_heatmap(tmp_path: Path) -> None:
    steps, layers, load = read_heatmap(tmp_path / "none")
    assert (steps, layers, load.shape) == ([], [], (0, 0, 0))
