"""The layout rules of the config and the limits of the schedule builders are the same rules.

The two floors do not import each other; this holds them together.
"""

import pytest

from moe_runtime.config.axes import resolve_schedule
from moe_runtime.config.fit import layout_findings
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import BatchConfig, LayoutConfig
from moe_runtime.schedule.builders import BUILDERS, admissible, build


@pytest.mark.parametrize("name", [*BUILDERS, "auto"])
def test_config_and_builders_admit_the_same_sizes(name: str) -> None:
    model = load_config("v3_16b").model
    for num_ranks in range(1, 9):
        for num_microbatches in range(1, 41):
            layout = LayoutConfig(pp=num_ranks, schedule=name)  # type: ignore[arg-type]
            batch = BatchConfig(seq_len=1, global_batch_size=num_microbatches)
            schedule = resolve_schedule(layout)
            by_config = not layout_findings(model, layout, batch)
            by_schedule = admissible(schedule, num_ranks, num_microbatches) is None
            assert by_config == by_schedule, (schedule, num_ranks, num_microbatches)


def test_the_config_offers_the_schedules_that_there_are() -> None:
    for name in BUILDERS:
        assert resolve_schedule(LayoutConfig(schedule=name)) == name  # type: ignore[arg-type]
        num_ranks = 1 if name == "single" else 2
        assert build(name, num_ranks, 4)
