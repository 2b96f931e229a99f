"""Microbatches alive at once, as a run measures them, against the schedule's own count and the paper's table.

The measure is the life of the objects themselves: each tells when the last reference to it has gone.
"""

import pytest

from moe_runtime.schedule.builders import build
from tests.dist.layout_case import Case, batch, run_lane
from tests.dist.layout_case import build as build_case
from tests.ranks import run_ranks_once

LAYOUTS = {
    name: ({"pp": 4, "schedule": name}, 12)
    for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")
}


def _measured(rank: int, world_size: int) -> dict[str, int]:
    peaks = {}
    for name, (layout, microbatches) in LAYOUTS.items():
        runtime = build_case(Case(name, layout, microbatches, 1, model={"num_layers": 8}), rank)
        runtime.clock.restart()
        run_lane(runtime, batch(runtime.config))
        peaks[name] = runtime.clock.peak_live
        runtime.clock.restart()
        assert runtime.clock.peak_live == 0, (
            f"{name}: microbatches outlive the step"
        )
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_holds_as_many_microbatches_as_the_schedule_says(name: str) -> None:
    layout, microbatches = LAYOUTS[name]
    measured = tuple(found[name] for found in run_ranks_once(_measured, 4))
    assert measured == build(name, layout["pp"], microbatches).check().peak_live
    expected = {
        "dualpipe": (5, 5, 5, 5),
        "1f1b": (4, 3, 2, 1),
        "dualpipev": (9, 9, 9, 9),
    }  # Ref: DSV3 Table 2
    assert measured == expected.get(name, measured)
