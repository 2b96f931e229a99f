"""What a user may leave out of costs, and what then holds."""

import pytest

from moe_runtime.planner.costs import StageCosts
from moe_runtime.planner.costs_text import DEFAULT, read_costs


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        (DEFAULT, StageCosts(1, 1, 1)),
        ("F=2", StageCosts(2, 2, 2)),
        ("F=1,B=3", StageCosts(1, 1.5, 1.5)),
        ("F=1,B=3,W=1", StageCosts(1, 2, 1)),
        ("F=1, B=3, I=1", StageCosts(1, 1, 2)),
        ("I=1,W=2,B=3", StageCosts(1, 1, 2)),
        ("F=1,B=2,C=0.5", StageCosts(1, 1, 1, 0.5, 0.5)),
        ("F=1,B=2,C=0.5,CB=1e-1", StageCosts(1, 1, 1, 0.5, 0.1)),
    ],
)
def test_what_is_left_out_follows_from_the_rest(text: str, stage: StageCosts) -> None:
    assert read_costs(text).model == stage


def test_a_model_is_cut_into_the_stages_of_a_schedule() -> None:
    costs = read_costs("F=1,B=2,T=0.25,H=0.5").of(num_ranks=4, num_stages=8)
    assert costs.stages == (StageCosts(0.5, 0.5, 0.5, live=0.5),) * 8
    assert (costs.transfer, costs.hidden) == (0.25, 0.5)
