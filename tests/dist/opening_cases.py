"""What every rank of a gloo world runs to show that dispatchers open alike everywhere, or are refused."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from moe_comm.alltoall import AllToAllDispatcher
from moe_comm.errors import PlacementError
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from moe_comm.two_hop import TwoHopDispatcher

from tests.dist.exchange_cases import exchange, expect, require_same_bits
from tests.dist.openings import Case, Setting, SharedGroups, run_each
from tests.dist.refusal_cases import raised
from tests.unit.comm.routings import draw

# What the odd rank opens otherwise: of the setting, of the placement; and what all ranks are told.
OPENINGS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "kind": ({"kind": "alltoall"}, {}, "the same kind on all ranks"),
    "wire": ({"wire": "fp8"}, {}, "the same wire on all ranks"),
    "chunks": (
        {"chunks": 5},
        {},
        "the same chunks on all ranks, got 4 on expert-parallel rank 0 and 5 on rank",
    ),
    "max_rows": ({"max_rows": 7}, {}, "the same max_rows on all ranks"),
    "confirm": ({"confirm": False}, {}, "the same confirm on all ranks, got 1 on"),
    "num_experts": ({}, {}, "the same number of experts on all ranks, got"),
    "num_groups": ({}, {"num_groups": 3}, "the same num_groups on all ranks, got none on"),
    "first_rank": ({}, {"first_rank": 3}, "the same first_rank on all ranks, got 0 on"),
    "ranks_per_node": ({}, {"ranks_per_node": 7}, "the same ranks_per_node on all ranks, got"),
}


def opened_differently(what: str, setting: Setting, groups: SharedGroups) -> None:
    """Ranks that open different dispatchers are told which number differs where; another opening works."""
    change, layout, words = OPENINGS[what]
    odd = groups.size - 1
    num_experts = 3 * groups.size
    if what == "kind" and setting.kind == "alltoall":
        change = {"kind": "two_hop", "ranks_per_node": 1}
    if what == "chunks" and setting.kind == "alltoall":
        return  # not read there
    wrong = setting.but(**change) if groups.rank == odd else setting
    experts = num_experts * 2 if what == "num_experts" and groups.rank == odd else num_experts
    mine = layout if groups.rank == odd else {}
    error = raised(lambda: wrong.open(experts, groups, **mine))
    assert isinstance(error, PlacementError), repr(error)
    assert words in str(error) and "rank 0" in str(error) and f"on rank {odd}" in str(error), error
    drawn = draw("random", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    got, expected = exchange(setting, groups, drawn), expect(setting, drawn, groups.rank)
    require_same_bits(**{name: (got[name], expected[name]) for name in expected})


def layouts_without_two_hops(setting: Setting, groups: SharedGroups) -> None:
    """two_hop refuses a layout that does not suit, on all ranks; auto takes alltoall and says so once."""
    rank, size = groups.rank, groups.size
    layouts: dict[str, dict[str, int]] = {
        f"at least 2 nodes, got {size} ranks on one node": {},
        f"whole nodes, got {size} ranks from global rank 1 with {size} on": {
            "ranks_per_node": size,
            "first_rank": 1,
        },
        f"whole nodes, got {size} ranks from global rank {size} with {size + 1} on": {
            "ranks_per_node": size + 1,
            "first_rank": size,
        },
        f"whole routing groups on each node, got 3 groups on {size} nodes": {
            "ranks_per_node": 1,
            "num_groups": 3,
        },
    }
    suits = Placement(3 * size, size, rank, ranks_per_node=1, num_groups=size)
    opened = open_dispatcher("auto", suits, groups)
    with said_by_moe_comm() as said:
        for words, layout in layouts.items():
            placement = Placement(3 * size, size, rank, **layout)
            error = raised(lambda placement=placement: open_dispatcher("two_hop", placement, groups))
            assert isinstance(error, PlacementError) and words in str(error), error
            assert str(error).startswith("two_hop: ") and "use 'alltoall'" in str(error), error
            assert isinstance(open_dispatcher("auto", placement, groups), AllToAllDispatcher)
    assert isinstance(opened, TwoHopDispatcher)
    # Only the first rank of the world says so, for all groups.
    expected = [words for words, layout in layouts.items() if rank == 0 and "first_rank" not in layout]
    assert len(said) == len(expected), said
    for words, line in zip(expected, said, strict=True):
        assert re.search(f"auto takes the dispatcher alltoall: for two_hop expected .*{words}", line), line


@contextmanager
def said_by_moe_comm() -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("moe_comm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def all_cases() -> dict[str, Case]:
    """Every case by name; each runs with every setting."""
    cases: dict[str, Case] = {f"another {what}": partial(opened_differently, what) for what in OPENINGS}
    return cases | {"layouts without two hops": layouts_without_two_hops}


def run_cases(rank: int, world_size: int) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    return run_each(all_cases(), world_size)
