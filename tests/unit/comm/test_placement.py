from collections import Counter

import pytest
from moe_comm.errors import CommError, PlacementError
from moe_comm.factory import open_dispatcher
from moe_comm.local import LocalDispatcher
from moe_comm.placement import Placement
from moe_comm.two_hop import why_not_two_hop


def test_every_expert_has_one_place_and_places_are_contiguous():
    placement = Placement(num_experts=12, ep_size=4, ranks_per_node=2)
    places = [(placement.rank_of(e), placement.slot_of(e)) for e in range(12)]
    assert places == [(rank, slot) for rank in range(4) for slot in range(3)]
    assert [placement.node_of(e) for e in range(12)] == [0] * 6 + [1] * 6
    assert list(placement.experts_of(2)) == [6, 7, 8]
    assert placement.num_nodes == 2


def test_a_group_that_begins_inside_a_node_is_cut_where_the_node_ends():
    placement = Placement(num_experts=4, ep_size=4, ranks_per_node=3, first_rank=4)
    assert [placement.node_of_rank(rank) for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("ranks_per_node", "first_rank", "lanes", "whole"),
    [
        (None, 0, 8, True),
        (8, 8, 8, True),
        (16, 8, 8, True),
        (4, 0, 4, True),
        (4, 12, 4, True),
        (1, 5, 1, True),
        (4, 2, 4, False),
        (3, 0, 3, False),
        (3, 3, 3, False),
        (9, 8, 8, False),
        (12, 8, 8, False),
    ],
)
def test_a_group_has_whole_nodes_if_every_node_of_it_has_as_many_of_its_ranks(
    ranks_per_node, first_rank, lanes, whole
):
    placement = Placement(16, 8, 0, ranks_per_node=ranks_per_node, first_rank=first_rank)
    members = Counter(placement.node_of_rank(rank) for rank in range(8))
    assert placement.num_nodes == len(members)
    assert placement.has_whole_nodes == whole == (set(members.values()) == {lanes})
    assert not whole or placement.lanes == lanes


def test_two_hops_need_several_whole_nodes_of_whole_groups():
    def why(**layout: int) -> str | None:
        return why_not_two_hop(Placement(24, 8, 3, **layout))

    assert why(ranks_per_node=4) is None
    assert why(ranks_per_node=4, num_groups=2) is why(ranks_per_node=2, num_groups=8) is None
    assert why() == why(ranks_per_node=8) == "expected a group of at least 2 nodes, got 8 ranks on one node"
    assert "8 ranks from global rank 2 with 4 on each node" in why(ranks_per_node=4, first_rank=2)
    assert "8 ranks from global rank 8 with 12 on each node" in why(ranks_per_node=12, first_rank=8)
    assert "got 3 groups on 2 nodes" in why(ranks_per_node=4, num_groups=3)
    assert "got 2 groups on 4 nodes" in why(ranks_per_node=2, num_groups=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_experts": 6, "ep_size": 4}, r"6 experts do not divide over 4 .* \[1, 2, 3, 6\]"),
        ({"num_experts": 4, "ep_size": 2, "ep_rank": 2}, r"ep_rank in 0\.\.1, got 2"),
        ({"num_experts": 0}, "at least 1 expert"),
        ({"num_experts": 4, "ep_size": 2, "ranks_per_node": 0}, "ranks_per_node >= 1"),
        ({"num_experts": 4, "num_groups": 3}, "num_groups that divides 4 experts, got 3"),
        ({"num_experts": 4, "num_groups": 0}, "num_groups that divides 4 experts, got 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_in_words(arguments, words):
    with pytest.raises(PlacementError, match=words):
        Placement(**arguments)


def test_an_expert_out_of_range_is_refused():
    with pytest.raises(PlacementError, match=r"0\.\.3, got 4"):
        Placement(4).rank_of(4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"wire": "fp4"}, "one of auto, bf16, fp32, fp8, fp8_pow2, got 'fp4'"),
        ({"chunks": 0}, "chunks of at least 1, got 0"),
        ({"max_rows": -2}, "max_rows of at least 1, got -2"),
    ],
)
def test_the_factory_says_which_option_is_wrong_whatever_the_kind(options, words):
    with pytest.raises(CommError, match=words):
        open_dispatcher("local", Placement(4), **options)


def test_auto_is_local_on_one_rank_and_needs_no_process_group():
    assert isinstance(open_dispatcher("auto", Placement(4)), LocalDispatcher)


@pytest.mark.parametrize(
    ("kind", "ep_size", "words"),
    [
        ("deepep", 1, "auto, local, alltoall, two_hop, got 'deepep'"),
        ("local", 2, "use 'alltoall'"),
        ("auto", 2, "init_process_group"),
        ("two_hop", 2, "init_process_group"),
    ],
)
def test_the_factory_says_what_does_not_suit(kind, ep_size, words):
    with pytest.raises(CommError, match=words):
        open_dispatcher(kind, Placement(4, ep_size))
