import pytest
from moe_comm.errors import CommError, PlacementError
from moe_comm.factory import open_dispatcher
from moe_comm.local import LocalDispatcher
from moe_comm.placement import Placement


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
    ("arguments", "words"),
    [
        ({"num_experts": 6, "ep_size": 4}, r"6 experts do not divide over 4 .* \[1, 2, 3, 6\]"),
        ({"num_experts": 4, "ep_size": 2, "ep_rank": 2}, r"ep_rank in 0\.\.1, got 2"),
        ({"num_experts": 0}, "at least 1 expert"),
        ({"num_experts": 4, "ep_size": 2, "ranks_per_node": 0}, "ranks_per_node >= 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_in_words(arguments, words):
    with pytest.raises(PlacementError, match=words):
        Placement(**arguments)


def test_an_expert_out_of_range_is_refused():
    with pytest.raises(PlacementError, match=r"0\.\.3, got 4"):
        Placement(4).rank_of(4)


def test_auto_is_local_on_one_rank_and_needs_no_process_group():
    assert isinstance(open_dispatcher("auto", Placement(4)), LocalDispatcher)


@pytest.mark.parametrize(
    ("kind", "ep_size", "words"),
    [
        ("deepep", 1, "auto, local, alltoall, got 'deepep'"),
        ("local", 2, "use 'alltoall'"),
        ("auto", 2, "init_process_group"),
    ],
)
def test_the_factory_says_what_does_not_suit(kind, ep_size, words):
    with pytest.raises(CommError, match=words):
        open_dispatcher(kind, Placement(4, ep_size))
