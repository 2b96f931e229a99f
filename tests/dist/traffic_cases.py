"""What every rank of a gloo world runs to show that the counters say what the routing alone predicts."""

from collections.abc import Sequence
from functools import partial

import torch
from moe_comm.control import HEADER_SIZE
from moe_comm.traffic import Traffic
from moe_comm.two_hop import DEFAULT_CHUNKS

from tests.dist.openings import Case, Setting, SharedGroups, run_each
from tests.unit.comm.plain_hops import Layout, Sent, record_bytes, rows_sent
from tests.unit.comm.routings import PATTERNS, draw


def counted_traffic(pattern: str, wire: str, setting: Setting, groups: SharedGroups) -> None:
    """Rows and bytes of every operation equal what loops over the routing alone count."""
    rank, hidden, top_k = groups.rank, 130, 1 if pattern in ("one_expert", "top_1") else 3
    drawn = draw(pattern, groups.size, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=hidden)
    dispatcher = setting.but(wire=wire).open(drawn.num_experts, groups)
    dispatcher.traffic.snapshot(reset=True)
    got = []
    received = dispatcher.dispatch(*drawn.of(rank)).wait()
    got.append(dispatcher.traffic.snapshot(reset=True))
    dispatcher.combine(received.rows, received.handle).wait()
    got.append(dispatcher.traffic.snapshot(reset=True))
    dispatcher.combine_backward(drawn.tokens[rank], received.handle).wait()
    got.append(dispatcher.traffic.snapshot(reset=True))
    dispatcher.dispatch_backward(received.rows, received.row_weights, received.handle).wait()
    got.append(dispatcher.traffic.snapshot(reset=True))

    layout = setting.layout(drawn.num_experts, groups.size)
    out, back = (rows_sent(setting.kind, drawn.expert_ids, layout, rank, back=way) for way in (False, True))
    coded = {"auto": [(2, 130)], "fp8": [(1, 130), (4, 2)], "fp8_pow2": [(1, 130), (1, 2)]}[wire]
    row = [(2, 130)]  # what is summed goes in BF16 on all of these
    two = setting.kind == "two_hop"
    beside = [(2, top_k), (4, top_k)] if two else [(4, 1)]  # int16 ids and FP32 weights, or one weight
    counts = groups.size + (2 * DEFAULT_CHUNKS if two else layout.local_experts)
    expected = [
        traffic(sent, payload, record_bytes(*payload, *extras), 8 * (HEADER_SIZE + counts), layout, rank)
        for sent, payload, extras in (
            (out, coded, beside),
            (back, row, []),
            (out, coded, []),
            (back, row, [(4, top_k if two else 1)]),
        )
    ]
    assert got == expected, f"{got}\n{expected}"


def traffic(
    sent: Sent, payload: Sequence[tuple[int, int]], row_bytes: int, control: int, layout: Layout, rank: int
) -> Traffic:
    """What a meter shall say of rows sent and one control message to every rank."""
    values = sum(size * columns for size, columns in payload)
    near = sum(layout.node_of(other) == layout.node_of(rank) for other in range(layout.ranks)) - 1
    return Traffic(
        rows_self=sent.own,
        rows_intra=sent.intra,
        rows_inter=sent.inter,
        bytes_intra=sent.intra * values,
        bytes_inter=sent.inter * values,
        meta_bytes_intra=sent.intra * (row_bytes - values),
        meta_bytes_inter=sent.inter * (row_bytes - values),
        control_bytes_intra=control * near,
        control_bytes_inter=control * (layout.ranks - 1 - near),
    )


def all_cases() -> dict[str, Case]:
    """Every case by name; each runs with every setting."""
    wires = dict.fromkeys(PATTERNS, "auto") | {"random": "fp8", "masked": "fp8_pow2"}
    return {f"{pattern} {wire}": partial(counted_traffic, pattern, wire) for pattern, wire in wires.items()}


def run_cases(rank: int, world_size: int) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    return run_each(all_cases(), world_size)
