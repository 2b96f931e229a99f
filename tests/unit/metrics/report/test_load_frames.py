"""Loads of experts and numbers of layers: what lasts, what happened once, and who is dead."""

import numpy as np

from moe_runtime.metrics.heatmap import Heatmap
from moe_runtime.metrics.report.layer_table import FEW, LayerTable
from moe_runtime.metrics.report.load_frames import dead_experts, frames_of


def _heatmap(times: int, layers: int = 2, experts: int = 4) -> Heatmap:
    load = np.random.default_rng(3).uniform(0.5, 1.5, (times, layers, experts)).astype(np.float32)
    return Heatmap(list(range(10, 10 * times + 1, 10)), [f"layers.{n}" for n in range(layers)], load)


def test_few_times_are_kept_as_they_are() -> None:
    heatmap = _heatmap(30)
    frames = frames_of(heatmap)
    assert frames is not None
    assert frames.first_steps == frames.last_steps == heatmap.steps
    assert frames.mean is frames.furthest is heatmap.load


def test_many_times_become_frames_that_keep_what_happened_once() -> None:
    heatmap = _heatmap(100)
    heatmap.load[37, 1, 2], heatmap.load[61, 0, 3] = 0.0, 3.9
    frames = frames_of(heatmap, most_cells=160)
    assert frames is not None and frames.mean.size + frames.furthest.size <= 160
    assert frames.first_steps[0] == 10 and frames.last_steps[-1] == 1000
    assert [last + 10 for last in frames.last_steps[:-1]] == frames.first_steps[1:]
    assert (frames.furthest == 0.0).sum() == 1 and frames.furthest[:, 0, 3].max() == np.float32(3.9)
    first = len([step for step in heatmap.steps if step <= frames.last_steps[0]])
    np.testing.assert_allclose(frames.mean[0], heatmap.load[:first].mean(axis=0))


def test_a_dead_expert_is_found_with_the_step_since_which_it_is() -> None:
    heatmap = _heatmap(20)
    heatmap.load[3, 0, 1] = 0.0  # once idle, then busy again: not dead
    heatmap.load[12:, 1, 3] = 0.005
    found, more = dead_experts(heatmap)
    assert [(one.layer, one.expert, one.since) for one in found] == [("layers.1", 3, 130)]
    assert more == 0


def test_a_run_without_loads_has_no_frames() -> None:
    empty = Heatmap([], [], np.zeros((0, 0, 0), dtype=np.float32))
    assert frames_of(empty) is None and dead_experts(empty) == ([], 0)


def test_of_steps_that_share_a_column_a_layer_shows_the_worst() -> None:
    table = LayerTable()
    for step in range(1, 5001):
        bad = step == 3210
        layers = {"layers.1": {"violation": 9.0 if bad else 0.1, "load_entropy": 0.2 if bad else 0.9}}
        table.add(step, layers | ({"layers.2": {"violation": 0.3}} if step > 2500 else {}))
    steps, values = table.table()
    assert len(steps) <= FEW and table.layers == ["layers.1", "layers.2"]
    column = np.flatnonzero(steps <= 3210)[-1]
    violation, entropy = table.names.index("violation"), table.names.index("load_entropy")
    assert values[violation, 0, column] == 9.0 and values[entropy, 0, column] == np.float32(0.2)
    assert np.isnan(values[violation, 1, 0]) and values[violation, 1, -1] == np.float32(0.3)
