"""Which program a run gets: the one it names, or the shortest in the simulator, within its memory."""

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.layout import check_layout
from moe_runtime.errors import ConfigError
from moe_runtime.planner.choose import Choice, choose, reckoned_costs, run_costs
from moe_runtime.planner.costs import Costs
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import write_trace
from moe_runtime.schedule.builders import BUILDERS, build
from tests.unit.config.samples import build as build_config
from tests.unit.planner.synthetic import trace_of


def _run(**layout: Any) -> Any:
    model = {"num_layers": 8, "num_dense_layers": 0}
    return build_config(model=model, layout={"pp": 2, **layout}, batch={"global_batch_size": 16})


def _choose(**layout: Any) -> tuple[Choice, Costs]:
    run = _run(**layout)
    resolved = check_layout(run)
    costs = run_costs(run.model, run.layout, resolved)
    return choose(run.model, run.layout, resolved, resolved.num_microbatches), costs


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "single"])
def test_a_named_schedule_is_its_builders(name: str) -> None:
    choice, _ = _choose(schedule=name)
    assert choice == Choice(build(name, 2, 16))


def test_auto_takes_a_builders_program_where_no_search_beats_it() -> None:
    choice, _ = _choose(schedule="auto", costs="F=1,I=1,W=1")
    assert choice.program.name == "zbv" and choice.said is not None and "auto: zbv" in choice.said


def test_auto_takes_what_the_search_finds_where_that_is_shorter() -> None:
    choice, costs = _choose(schedule="auto", dp=2, ep=2, costs="F=1,I=2,W=1,C=1")
    assert choice.program.name == "searched"
    made = simulate(choice.program, costs).makespan
    for name in ("zbv", "dualpipev"):
        assert made < simulate(build(name, 2, choice.program.num_microbatches), costs).makespan


def test_searched_keeps_to_the_memory_of_the_config() -> None:
    choice, costs = _choose(schedule="searched", max_live=1.5)
    timeline = simulate(choice.program, costs)
    assert max(map(timeline.peak_memory, range(2))) <= 1.5
    with pytest.raises(ConfigError, match=r"^layout.max_live: .*the least is 1.25; allow that"):
        _choose(schedule="searched", max_live=0.5)


def test_reckoned_costs_follow_layers_and_head() -> None:
    run = _run(schedule="zbv", dp=2, ep=2, layers_per_stage=[1, 3, 3, 1])
    costs = reckoned_costs(run.model, check_layout(run))
    first, middle, _, last = costs.stages
    assert middle.forward == pytest.approx(3 * first.forward, rel=0.1) and last.forward > first.forward
    assert sum(stage.forward for stage in costs.stages) == pytest.approx(2.0)  # one for each pipeline rank
    assert sum(stage.live for stage in costs.stages) == pytest.approx(2.0)
    assert middle.forward_comm == middle.forward and middle.backward_comm == 2 * middle.forward


def test_measured_costs_are_used_as_they_are_or_spread_over_other_stages(tmp_path: Path) -> None:
    program, path = build("zbv", 2, 4), tmp_path / "trace.json"
    measured = Costs.split(reckoned_costs(_run().model, check_layout(_run())).stages[0], 2, 4)
    write_trace(trace_of(simulate(program, measured), program), path)
    run = _run(schedule="searched", costs=str(path))
    same = run_costs(run.model, run.layout, check_layout(run))
    straight = _run(schedule="searched", costs=str(path), layers_per_stage=[4, 4])
    spread = run_costs(straight.model, straight.layout, check_layout(straight))
    assert len(same.stages) == 4 and len(spread.stages) == 2
    assert spread.stages[0].forward == pytest.approx(2 * same.stages[0].forward, rel=1e-6)


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ("nowhere.json", "nowhere.json: cannot be read"),
        ("F=1,X=2", "layout.costs: expected KEY=NUMBER"),
        ("F=-1", "layout.costs: F: expected 0 or a number from"),
    ],
)
def test_costs_that_cannot_be_read_are_a_mistake_of_the_config(costs: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        _choose(schedule="auto", costs=costs)
