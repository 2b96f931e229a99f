"""The index work of two hops against plain loops."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.hops import (
    FanOut,
    chosen_parts,
    chunk_bounds,
    counts_for_all,
    land,
    lengths_from_lanes,
    lengths_from_nodes,
)
from moe_comm.placement import Placement
from torch import Tensor

from tests.unit.comm.plain_hops import Layout
from tests.unit.comm.routings import without_some


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[Tensor], Layout, int]:
    """(expert ids of each rank, where experts are, chunks)"""
    nodes, lanes = draw(st.sampled_from([(2, 1), (3, 1), (2, 2), (3, 2), (2, 4)]))
    local_experts, chunks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    num_experts = nodes * lanes * local_experts
    top_k, masked = draw(st.integers(1, min(4, num_experts))), draw(st.sampled_from([0.0, 0.4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids = []
    for _ in range(nodes * lanes):
        scores = torch.rand(draw(st.integers(0, 7)), num_experts, generator=generator)
        ids.append(without_some(scores.topk(top_k, dim=1).indices, masked, generator))
    return ids, Layout(nodes * lanes, local_experts, lanes), chunks


def _placement(layout: Layout, rank: int) -> Placement:
    return Placement(
        layout.ranks * layout.local_experts, layout.ranks, rank, ranks_per_node=layout.ranks_per_node
    )


def _ranks_of(layout: Layout, ids: list[int]) -> set[int]:
    return {rank for by_rank in layout.stops(ids).values() for rank in by_rank}


@given(st.integers(0, 50), st.integers(1, 60))
def test_chunks_are_consecutive_and_as_equal_as_can_be(num_tokens, chunks):
    bounds = chunk_bounds(num_tokens, chunks)
    lengths = [end - first for first, end in bounds]
    assert len(bounds) == chunks and bounds[0][0] == 0 and bounds[-1][1] == num_tokens
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("first", "experts", "parts"), [(0, 2, 4), (4, 2, 1), (3, 1, 3), (0, 8, 1)])
def test_a_part_is_chosen_if_any_of_its_experts_is(first, experts, parts, dtype):
    ids = torch.randint(-1, 8, (60, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids[7] = -1
    chosen = chosen_parts(ids, first, experts, parts)
    assert chosen.shape == (60, parts)
    for line, got in zip(ids.tolist(), chosen.tolist(), strict=True):
        members = [range(first + part * experts, first + (part + 1) * experts) for part in range(parts)]
        assert got == [any(expert in part for expert in line) for part in members]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(1, 4), st.integers(0, 1000))
def test_rows_fan_out_by_place_and_come_back_by_place(rows, places, seed):
    chosen = torch.rand(rows, places, generator=torch.Generator().manual_seed(seed)) < 0.5
    copies = FanOut.of(chosen)
    by_hand = [(place, row) for place in range(places) for row in range(rows) if chosen[row, place]]
    assert copies.order.tolist() == [row for _, row in by_hand]
    assert copies.counts == tuple(sum(p == place for p, _ in by_hand) for place in range(places))
    offsets, indices = copies.bags.offsets.tolist(), copies.bags.indices.tolist()
    bags = [[by_hand[copy] for copy in indices[i:j]] for i, j in pairwise(offsets)]
    assert bags == [[(place, row) for place in range(places) if chosen[row, place]] for row in range(rows)]


@settings(max_examples=60, deadline=None)
@given(routings())
def test_every_rank_is_told_what_it_will_receive(drawn):
    expert_ids, layout, chunks = drawn
    size = layout.ranks
    said = [counts_for_all(ids, _placement(layout, r), chunks) for r, ids in enumerate(expert_ids)]
    assert all(counts.shape == (size, size + 2 * chunks) for counts in said)
    for source, ids in enumerate(expert_ids):
        tokens = ids.tolist()
        bounds = chunk_bounds(len(tokens), chunks)
        for rank in range(size):
            rows = [
                sum(layout.rank_of(e) == d for line in tokens for e in line if e >= 0) for d in range(size)
            ]
            parts = [tokens[first:end] for first, end in bounds]
            ending = [sum(rank in _ranks_of(layout, line) for line in part) for part in parts]
            node = layout.node_of(rank)
            crossing = [sum(node in layout.stops(line) for line in part) for part in parts]
            assert said[source][rank].tolist() == rows + ending + crossing


def _arrivals(expert_ids: list[Tensor], layout: Layout, rank: int, chunks: int) -> list[tuple[int, int]]:
    """(source, token) of the records of a rank: by chunk, lane of the source, node of the source, token."""
    arrived = []
    for source, ids in enumerate(expert_ids):
        lane, node = source % layout.ranks_per_node, layout.node_of(source)
        for chunk, (first, end) in enumerate(chunk_bounds(len(ids), chunks)):
            for token in range(first, end):
                if rank in _ranks_of(layout, ids[token].tolist()):
                    arrived.append((chunk, lane, node, token, source))
    return [(source, token) for *_, token, source in sorted(arrived)]


@settings(max_examples=60, deadline=None)
@given(routings(), st.data())
def test_what_arrives_is_put_in_the_order_of_alltoall_and_back(drawn, data):
    expert_ids, layout, chunks = drawn
    rank = data.draw(st.integers(0, layout.ranks - 1))
    placement = _placement(layout, rank)
    heard = torch.stack(
        [counts_for_all(i, _placement(layout, s), chunks)[rank] for s, i in enumerate(expert_ids)]
    )
    ending, crossing = heard[:, layout.ranks :].split(chunks, dim=1)
    arrived = _arrivals(expert_ids, layout, rank, chunks)
    top_k = expert_ids[0].shape[1]
    lines = [expert_ids[source][token] for source, token in arrived]
    ids = torch.stack(lines) if lines else torch.empty((0, top_k), dtype=torch.int64)
    landing = land(ids.to(torch.int16), ending, placement)

    rows = sorted(
        (int(expert), source, token, choice, record)
        for record, (source, token) in enumerate(arrived)
        for choice, expert in enumerate(ids[record])
        if expert >= 0 and layout.rank_of(int(expert)) == rank
    )
    assert landing.to_expert.tolist() == [record for *_, record in rows]
    first = rank * layout.local_experts
    counts = [sum(e == first + slot for e, *_ in rows) for slot in range(layout.local_experts)]
    assert landing.plan.expert_counts.tolist() == counts
    in_order = sorted(range(len(arrived)), key=lambda record: arrived[record])
    assert landing.from_arrival.tolist() == [in_order.index(record) for record in range(len(arrived))]
    choices = landing.plan.row_slots.remainder(top_k).tolist()
    assert choices == [choice for _, _, _, choice, _ in rows]
    offsets, indices = landing.bags.offsets.tolist(), landing.bags.indices.tolist()
    for record, (i, j) in enumerate(pairwise(offsets)):
        of_record = [(rows[row][3], rows[row][4]) for row in indices[i:j]]
        assert of_record == sorted((row[3], record) for row in rows if row[4] == record)
    _check_lengths(arrived, expert_ids, layout, rank, (ending, crossing), chunks)


def _check_lengths(
    arrived: list[tuple[int, int]],
    expert_ids: list[Tensor],
    layout: Layout,
    rank: int,
    heard: tuple[Tensor, Tensor],
    chunks: int,
) -> None:
    """Lengths of the messages of both hops, by counting records."""
    placement, lanes = _placement(layout, rank), layout.ranks_per_node
    nodes = layout.ranks // lanes
    for chunk in range(chunks):

        def in_chunk(source: int, token: int, chunk: int = chunk) -> bool:
            first, end = chunk_bounds(len(expert_ids[source]), chunks)[chunk]
            return first <= token < end

        from_lanes = [sum(s % lanes == lane and in_chunk(s, t) for s, t in arrived) for lane in range(lanes)]
        assert lengths_from_lanes(heard[0], placement, chunk) == tuple(from_lanes)
        from_nodes = [
            sum(
                layout.node_of(rank) in layout.stops(line) and in_chunk(source, token)
                for source in [node * lanes + rank % lanes]
                for token, line in enumerate(expert_ids[source].tolist())
            )
            for node in range(nodes)
        ]
        assert lengths_from_nodes(heard[1], placement, chunk) == tuple(from_nodes)
