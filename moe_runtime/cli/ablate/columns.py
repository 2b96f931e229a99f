"""What a study's table can show: a name, where it lies in a result, how it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A figure of a run.

    Args:
        title: of the table's column, with its unit.
        of: the figure in a result, None where the run has none.
        digits: after the point.
        relative: differences are given in percent of the arm compared with.
        exact: counted, not drawn: no seed changes it, so it needs no interval.
    """

    title: str
    of: Callable[[dict[str, Any]], float | None]
    digits: int = 3
    relative: bool = False
    exact: bool = False


def _measure(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result["measures"].get(name)


COLUMNS: dict[str, Column] = {
    "val_loss": Column("validation loss, nats a token", _measure("val_loss"), 4, relative=True),
    "val_bpb": Column("bits per byte", _measure("val_bpb"), 4, relative=True),
    "violation": Column("violation, second half", _measure("violation"), 3),
    "violation_largest": Column("largest violation of a step, second half", _measure("violation_largest"), 3),
    "violation_text": Column("violation over the validation text", _measure("violation_text"), 3),
    "dead_experts": Column("dead experts, %", _measure("dead_experts"), 1),
    "starved_experts": Column("starved experts, %", _measure("starved_experts"), 1),
    "copies_between_nodes": Column(
        "copies sent to other nodes, a token", _measure("copies_between_nodes"), 3
    ),
    "nodes_reached": Column("nodes reached, a token", _measure("nodes_reached"), 3),
    "accepted_sampled": Column("first draft stands, sampled, %", _measure("accepted_sampled"), 1),
    "accepted_greedy": Column("first draft stands, greedy, %", _measure("accepted_greedy"), 1),
    "second_sampled": Column("both drafts stand, sampled, %", _measure("second_sampled"), 1),
    "cache_bytes": Column("cache, bytes a token", _measure("cache_bytes"), 0, exact=True),
    "params_total": Column("weights, thousands", _measure("params_total"), 0, exact=True),
    "params_active": Column("active weights, thousands", _measure("params_active"), 0, exact=True),
    "flops": Column("training FLOPs, 1e12", _measure("flops"), 3, exact=True),
}
