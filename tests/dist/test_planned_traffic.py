"""What the planner says that dispatchers send is what their own counters say, to the byte."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache

import pytest
import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.traffic import Traffic
from moe_comm.transport_torch import TorchTransport
from torch import Tensor

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.router import choose_experts
from moe_runtime.planner.reckon.exchange import uniform_spread
from moe_runtime.planner.reckon.routed import Counted, count_exchange
from moe_runtime.planner.reckon.traffic import Sent, operation_bytes
from moe_runtime.planner.reckon.wire import OPERATIONS, RowFormat
from tests.dist.openings import Setting, SharedGroups
from tests.ranks import run_ranks_once
from tests.unit.comm.routings import draw

WORLD, HIDDEN = 4, 130
LAYOUTS = (("alltoall", 2), ("alltoall", 4), ("two_hop", 1), ("two_hop", 2))
WIRES = ("auto", "fp8", "fp8_pow2")
PATTERNS = ("unequal", "one_expert", "idle_rank", "adversarial", "masked")
WIDE = {"num_experts": 64, "num_groups": 8, "num_groups_kept": 3, "top_k": 6}
MANY = 6000  # tokens of a rank


def _exact_cases() -> Iterator[tuple[str, str, str, int, bool]]:
    for pattern in PATTERNS:
        for number, (kind, per_node) in enumerate(LAYOUTS):
            yield pattern, WIRES[(PATTERNS.index(pattern) + number) % 3], kind, per_node, number % 2 == 0


def _operations(dispatcher: Dispatcher, tokens: Tensor, weights: Tensor, ids: Tensor) -> list[Traffic]:
    """The counters of each of OPERATIONS."""
    counted = []

    def note() -> None:
        counted.append(dispatcher.traffic.snapshot(reset=True))

    dispatcher.traffic.snapshot(reset=True)
    received = dispatcher.dispatch(tokens, weights, ids).wait()
    note()
    dispatcher.combine(received.rows, received.handle).wait()
    note()
    dispatcher.combine_backward(tokens, received.handle).wait()
    note()
    dispatcher.dispatch_backward(received.rows, received.row_weights, received.handle).wait()
    note()
    return counted


def _exchange_all(rank: int, world: int) -> list[list[dict[str, int]]]:
    """Counters of this rank for every exact case, then for every layout with many tokens."""
    groups, found = SharedGroups(TorchTransport()), []
    for pattern, wire, kind, per_node, confirm in _exact_cases():
        drawn = draw(pattern, world, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=HIDDEN)
        setting = Setting(kind, per_node, wire, confirm=confirm)
        found.append(_operations(setting.open(drawn.num_experts, groups), *drawn.of(rank)))
    ids, weights = _balanced_choices(rank), torch.ones(MANY, WIDE["top_k"])
    for kind, per_node in LAYOUTS:
        dispatcher = Setting(kind, per_node, "bf16").open(WIDE["num_experts"], groups, num_groups=8)
        found.append(_operations(dispatcher, torch.zeros(MANY, 8, dtype=torch.bfloat16), weights, ids))
    return [[asdict(traffic) for traffic in counted] for counted in found]


def _balanced_choices(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    affinities = torch.randn(MANY, WIDE["num_experts"], generator=generator).sigmoid()
    groups, kept = WIDE["num_groups"], WIDE["num_groups_kept"]
    return choose_experts(affinities, torch.zeros(WIDE["num_experts"]), WIDE["top_k"], groups, kept)


@cache
def _counters() -> list[list[list[dict[str, int]]]]:
    return run_ranks_once(_exchange_all, WORLD)


def _planned(case: tuple[str, str, str, int, bool]) -> list[list[Counted]]:
    """Of every operation, of every rank."""
    pattern, wire, kind, per_node, confirm = case
    drawn = draw(pattern, WORLD, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=HIDDEN)
    ids = [chosen.tolist() for chosen in drawn.expert_ids]
    form = RowFormat(kind, wire, HIDDEN, drawn.expert_ids[0].shape[1], drawn.num_experts)
    return [count_exchange(form, operation, ids, per_node, confirmed=confirm) for operation in OPERATIONS]


@pytest.mark.parametrize("number", range(len(list(_exact_cases()))))
def test_bytes_of_a_known_routing_are_those_that_are_counted(number):
    case = list(_exact_cases())[number]
    counters = [of_rank[number] for of_rank in _counters()]
    for place, of_ranks in enumerate(_planned(case)):
        said = [asdict(counted) for counted in of_ranks]
        assert said == [counted[place] for counted in counters], f"{case}, {OPERATIONS[place]}"


@pytest.mark.parametrize("place", range(len(LAYOUTS)))
def test_bytes_from_statistics_alone_are_within_one_percent(place):
    kind, per_node = LAYOUTS[place]
    model = ModelConfig.model_construct(**WIDE)
    spread = uniform_spread(model, WORLD, per_node)
    form = RowFormat(kind, "bf16", 8, WIDE["top_k"], WIDE["num_experts"])
    counters = [of_rank[place - len(LAYOUTS)] for of_rank in _counters()]
    for at, operation in enumerate(OPERATIONS):
        planned = operation_bytes(form, operation, spread, MANY).times(WORLD)
        assert planned.fast == pytest.approx(_rows(counters, at, "intra"), rel=0.01)
        assert planned.network == pytest.approx(_rows(counters, at, "inter"), rel=0.01)
    assert planned != Sent()


def _rows(counters: Sequence[list[dict[str, int]]], operation: int, way: str) -> int:
    """Bytes of rows, with what goes beside them, of all ranks."""
    return sum(
        of_rank[operation][f"bytes_{way}"] + of_rank[operation][f"meta_bytes_{way}"] for of_rank in counters
    )
