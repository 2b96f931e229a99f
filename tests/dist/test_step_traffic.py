"""A whole forward and backward sends what the planner says: exchanges to the byte, pipeline messages too."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.config.layout import check_layout
from moe_runtime.planner.reckon.routed import Counted, count_exchange
from moe_runtime.planner.reckon.traffic import step_traffic
from moe_runtime.planner.reckon.wire import OPERATIONS, dispatcher_kind, row_format
from tests.dist.layout_case import Case, batch, build, run_lane
from tests.ranks import run_ranks

CASES = (
    Case(
        "two hops",
        {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe", "ranks_per_node": 1},
        microbatches=4,
        mtp_depth=1,
        precision="bf16",
    ),
    Case(
        "one node",
        {"pp": 2, "dp": 2, "ep": 2, "schedule": "1f1b", "ranks_per_node": 4},
        microbatches=3,
        precision="fp64",
    ),
)


class _Counting:
    """Passes messages on to a transport and adds up what leaves."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sent = inner, 0

    def send(self, tensor: Tensor, peer: int) -> Any:
        self.sent += tensor.numel() * tensor.element_size()
        return self.inner.send(tensor, peer)

    def receive(self, buffer: Tensor, peer: int) -> Any:
        return self.inner.receive(buffer, peer)


def _step(rank: int, world: int) -> list[tuple[dict[str, int], list[list[list[int]]], int]]:
    """Of each case: the dispatcher's counters, the choices of each dispatch, bytes to pipeline peers."""
    found = []
    for case in CASES:
        runtime = build(case, rank)
        transport = _Counting(runtime.executor._transport)
        runtime.executor._transport = transport
        chosen, dispatch = [], runtime.dispatcher.dispatch

        def noting(tokens: Tensor, weights: Tensor, ids: Tensor, chosen=chosen, dispatch=dispatch) -> Any:
            chosen.append(ids.tolist())
            return dispatch(tokens, weights, ids)

        runtime.dispatcher.dispatch = noting
        runtime.dispatcher.traffic.snapshot(reset=True)
        for _, param in runtime.named_params:
            param.grad_accum = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        run_lane(runtime, batch(runtime.config))
        found.append((asdict(runtime.dispatcher.traffic.snapshot()), chosen, transport.sent))
    return found


def _planned(case: Case, of_group: list[list[list[list[int]]]]) -> list[dict[str, int]]:
    """Counters of the ranks of one expert group, of the choices [rank][dispatch][token][choice]."""
    config = case.config()
    per_node = config.layout.ranks_per_node or 1
    kind = dispatcher_kind(config.model, config.layout.dispatcher, len(of_group), per_node)
    form = row_format(config, kind)
    totals = [dict.fromkeys(Counted.__dataclass_fields__, 0) for _ in of_group]
    for ids in zip(*of_group, strict=True):
        for operation in OPERATIONS:
            for total, counted in zip(totals, count_exchange(form, operation, ids, per_node), strict=True):
                for name, value in asdict(counted).items():
                    total[name] += value
    return totals


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    return run_ranks(_step, 4)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].name)
def test_a_step_sends_what_the_planner_says(steps, number):
    case = CASES[number]
    config = case.config()
    layout = check_layout(config)
    for first in (0, 2):  # expert groups are the lanes of a pipeline rank
        counted, chosen, sent = zip(*(steps[rank][number] for rank in (first, first + 1)), strict=True)
        assert list(counted) == _planned(case, list(chosen))
        planned = step_traffic(config, layout, first // layout.dp, config.layout.ranks_per_node)
        assert sum(sent) == layout.dp * (planned.pipeline.fast + planned.pipeline.network)
        near, far = (sum(of[f"control_bytes_{way}"] for of in counted) for way in ("intra", "inter"))
        assert (near, far) == (layout.dp * planned.counts.fast, layout.dp * planned.counts.network)
    assert any(of[number][0]["rows_inter" if number == 0 else "rows_intra"] for of in steps)
