"""Bytes of expert exchanges: from the rows that a run counted, exactly, and from statistics of routing alone.

A run's records say how many rows went how far; what a row and a message of counts weigh is reckoned. Each
of the four operations of a layer moves the same rows, so a quarter of them is each one's.
"""

from collections.abc import Mapping
from typing import Any

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.parts import stage_parts
from moe_runtime.planner.reckon.traffic import layer_traffic
from moe_runtime.planner.reckon.wire import OPERATIONS, dispatcher_kind, row_format

WAYS = ("inter", "intra")


def exchanged_bytes(
    config: RunConfig, layout: ResolvedLayout, record: Mapping[str, Any], ranks_a_node: int
) -> dict[str, float]:
    """What the rows of one step weigh, all ranks together, between nodes (`inter`) and within (`intra`).

    Args:
        record: of the step, with the rows that it counted.
        ranks_a_node: that share a machine.
    """
    kind = dispatcher_kind(config.model, config.layout.dispatcher, layout.ep, ranks_a_node)
    if kind is None:
        return dict.fromkeys(WAYS, 0.0)
    form = row_format(config, kind)
    weight = sum(form.record(operation).size for operation in OPERATIONS) / len(OPERATIONS)
    near = min(layout.ep, ranks_a_node) - 1
    others = {"intra": near, "inter": layout.ep - 1 - near}
    counts = dispatches(config, layout) * form.counts_bytes(layout.ep)
    return {way: record[f"comm_rows_{way}"] * weight + counts * others[way] for way in WAYS}


def expected_bytes(config: RunConfig, layout: ResolvedLayout, ranks_a_node: int) -> dict[str, float]:
    """The same from a router that prefers no expert."""
    tokens = config.batch.micro_batch_size * config.batch.seq_len
    one = layer_traffic(config, layout.ep, min(ranks_a_node, layout.ep), tokens)
    times = dispatches(config, layout)
    sent = list(one.values())
    return {
        "inter": times * sum(each.network for each in sent),
        "intra": times * sum(each.fast for each in sent),
    }


def dispatches(config: RunConfig, layout: ResolvedLayout) -> int:
    """Dispatches of a step, all ranks together: one of each lane for each microbatch and MoE layer."""
    layers = sum(part.moe + part.mtp for part in stage_parts(config.model, layout))
    return layers * layout.num_microbatches * layout.dp
