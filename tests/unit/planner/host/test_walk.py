"""The walk against the executor's own steps, and what it makes of exchanges and uneven rows."""

import statistics

import pytest
import torch
from moe_comm.local import LocalDispatcher

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.flight import Flight
from moe_runtime.parallel.stage import ObjectiveWeights, StageRunner
from moe_runtime.parallel.weight_grad import WeightGradSink
from moe_runtime.planner.host.cores import Start, Wait, Work
from moe_runtime.planner.host.walk import Routing, Walk
from moe_runtime.schedule import build
from tests.unit.planner.host.machine import made_up

SMALL = ("model.hidden_size=16", "model.ffn_size=16", "model.expert_ffn_size=8", "model.mtp_depth=2")


def walk_of(*overrides: str, routing: float = 0.0) -> Walk:
    config = load_config("calibrate", overrides)
    return Walk(config, check_layout(config), made_up(), Routing(routing))


@pytest.mark.parametrize("stage", [0, 1])
def test_phases_are_those_of_the_executor_in_its_order(stage: int) -> None:
    layout = ("layout.pp=2", "layout.dp=1", "layout.ep=1", "layout.schedule=zb1p")
    config = load_config("calibrate", (*SMALL, *layout))
    walk = Walk(config, check_layout(config), made_up(), Routing())
    program = build("zb1p", 2, 8)
    runner = _runner(config, stage)
    weights = ObjectiveWeights(1.0, 1.0, 0.0)
    steps = {
        "F": [(step.label, step.layer) for step in runner.forward_steps(Flight({}), training=True)],
        "I": [
            (step.label, step.layer)
            for step in runner.backward_steps(Flight({}), weights, weight_grads="later")
        ],
    }
    row = {str(entry)[:2]: entry for entry in program.rows[stage]}
    assert [(s.label, s.layer) for s in walk.forward(row[f"{stage}F"])] == steps["F"]
    assert [(s.label, s.layer) for s in walk.backward(row[f"{stage}I"], "none")] == steps["I"]
    spread = runner.backward_steps(Flight({}), weights, weight_grads="spread")
    assert [(s.label, s.layer) for s in walk.backward(row[f"{stage}I"], "spread")] == [
        (step.label, step.layer) for step in spread
    ]


def _runner(config: object, stage: int) -> StageRunner:
    layout = check_layout(config)  # type: ignore[arg-type]
    model = config.model  # type: ignore[attr-defined]
    last = layout.num_stages - 1
    chunk = Transformer(
        model, layers=layout.layers[stage], has_embedding=stage == 0, has_head=stage == last, device="meta"
    )
    dispatcher = LocalDispatcher(model.num_experts)
    return StageRunner(chunk.phases(), dispatcher, WeightGradSink(), _count_nothing, Clock())


def _count_nothing(layer: str, expert_ids: torch.Tensor) -> None:
    """Experts are not counted here."""


def test_every_exchange_is_begun_by_all_of_its_group_and_waited_for_once() -> None:
    walk = walk_of("layout.pp=2", "layout.schedule=dualpipe")
    ranks = walk.operations(build("dualpipe", 2, 4))
    for first in (0, 2):
        keys = [[op.key for op in ranks[rank] if isinstance(op, Start)] for rank in (first, first + 1)]
        waits = [op.key for op in ranks[first] if isinstance(op, Wait)]
        assert keys[0] == keys[1] and sorted(map(str, keys[0])) == sorted(map(str, waits))
        assert len(keys[0]) == len(set(keys[0])) > 0


def test_rows_of_a_group_vary_as_told_and_sum_to_the_whole() -> None:
    even, uneven = (walk_of("layout.dp=4", "layout.ep=4", routing=each) for each in (0.0, 0.2))
    program = build("single", 1, 4)

    def experts(walk: Walk) -> list[list[float]]:
        return [
            [op.seconds for op in ops if isinstance(op, Work) and op.name == "experts"]
            for ops in walk.operations(program)
        ]

    mean = experts(even)[0][0]
    shares = [[seconds / mean for seconds in together] for together in zip(*experts(uneven), strict=True)]
    assert all(sum(each) == pytest.approx(4) for each in shares)
    spread = statistics.pstdev([share for each in shares for share in each])
    # Two of eight experts a rank: 0.2 x sqrt(3 / 4 / 2).
    assert spread == pytest.approx(0.1225, rel=0.25)
