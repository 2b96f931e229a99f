"""The layout rules of the config and the limits of the schedule builders are the same rules.

The two floors do not import each other; this holds them together.
"""

from typing import get_args

import pytest

from moe_runtime.config.axes import Schedule, resolve_schedule
from moe_runtime.config.fit import layout_findings
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import BatchConfig, LayoutConfig
from moe_runtime.config.stages import stage_ranks
from moe_runtime.schedule.builders import BUILDERS, admissible, build, placement_of


@pytest.mark.parametrize("name", BUILDERS)
def test_config_and_builders_admit_the_same_sizes(name: str) -> None:
    model = load_config("v3_16b").model
    for num_ranks in range(1, 9):
        for num_microbatches in range(1, 41):
            layout = LayoutConfig(pp=num_ranks, schedule=name)  # type: ignore[arg-type]
            batch = BatchConfig(seq_len=1, global_batch_size=num_microbatches)
            by_config = not layout_findings(model, layout, batch)
            by_schedule = admissible(name, num_ranks, num_microbatches) is None
            assert by_config == by_schedule, (num_ranks, num_microbatches)


@pytest.mark.parametrize(
    ("name", "chunks"), [*((name, None) for name in BUILDERS), ("interleaved", 2), ("interleaved", 3)]
)
def test_config_and_builders_place_stages_alike(name: str, chunks: int | None) -> None:
    for num_ranks in (1,) if name == "single" else (2, 4, 8):
        layout = LayoutConfig(pp=num_ranks, schedule=name, chunks=chunks)  # type: ignore[arg-type]
        assert stage_ranks(layout, num_layers=64) == placement_of(name, num_ranks, chunks)


@pytest.mark.parametrize("name", ["auto", "searched"])
def test_what_is_chosen_by_costs_admits_any_sizes(name: str) -> None:
    model = load_config("v3_16b").model
    for num_ranks in range(1, 9):
        for num_microbatches in (1, 2, 3, 7):
            layout = LayoutConfig(pp=num_ranks, schedule=name)  # type: ignore[arg-type]
            batch = BatchConfig(seq_len=1, global_batch_size=num_microbatches)
            assert not layout_findings(model, layout, batch)


def test_the_config_offers_the_schedules_that_there_are() -> None:
    assert set(BUILDERS) | {"auto", "searched"} == set(get_args(Schedule))
    for name in BUILDERS:
        assert resolve_schedule(LayoutConfig(schedule=name)) == name  # type: ignore[arg-type]
        num_ranks = 1 if name == "single" else 2
        assert build(name, num_ranks, 4)
