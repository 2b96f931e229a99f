"""Counting what is sent, and what a plain count of the two hops must say in a case done by hand."""

import threading
from dataclasses import astuple

import torch
from moe_comm.placement import Placement
from moe_comm.traffic import Traffic, TrafficMeter

from tests.unit.comm.plain_hops import Layout, Sent, rows_sent


def test_rows_are_counted_by_how_far_they_go():
    meter = TrafficMeter(Placement(8, 4, 1, ranks_per_node=2))
    meter.count_rows((1, 2, 4, 8), payload_bytes=10, meta_bytes=3, ranks=range(4))
    assert meter.snapshot() == Traffic(2, 1, 12, 10, 120, 3, 36)
    meter.count_rows((5, 7), payload_bytes=1, meta_bytes=0, ranks=(1, 3))
    assert meter.snapshot(reset=True) == Traffic(7, 1, 19, 10, 127, 3, 36)
    assert meter.snapshot() == Traffic()


def test_control_messages_go_to_every_other_rank():
    meter = TrafficMeter(Placement(8, 4, 3, ranks_per_node=3))
    meter.count_control(40)
    assert meter.snapshot() == Traffic(control_bytes_intra=0, control_bytes_inter=120)


def test_a_group_that_begins_inside_a_node_knows_its_neighbours():
    meter = TrafficMeter(Placement(8, 4, 2, ranks_per_node=4, first_rank=2))
    meter.count_rows((1, 2, 4, 8), 1, 0, range(4))
    assert (meter.snapshot().rows_self, meter.snapshot().rows_intra, meter.snapshot().rows_inter) == (4, 8, 3)


def test_traffic_adds_up_field_by_field():
    one, two = Traffic(*range(1, 10)), Traffic(*range(10, 100, 10))
    assert astuple(one + two) == tuple(11 * n for n in range(1, 10))
    assert (one + two).all_bytes_intra == 11 * (4 + 6 + 8)
    assert (one + two).all_bytes_inter == 11 * (5 + 7 + 9)


def test_threads_may_count_at_once():
    meter = TrafficMeter(Placement(2, 2, 0))

    def count() -> None:
        for _ in range(2000):
            meter.count_rows((0, 1), 1, 1, (0, 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.snapshot() == Traffic(rows_intra=8000, bytes_intra=8000, meta_bytes_intra=8000)


def test_the_plain_count_is_that_of_a_case_done_by_hand():
    # 2 nodes x 2 ranks x 2 experts. Rank 1 has tokens for ranks (0, 3), (2, 2, 3) and none.
    ids = [torch.empty(0, 3, dtype=torch.int64) for _ in range(4)]
    ids[1] = torch.tensor([[0, 7, -1], [4, 5, 6], [-1, -1, -1]])
    layout = Layout(ranks=4, local_experts=2, ranks_per_node=2)
    flat = [rows_sent("alltoall", ids, layout, rank) for rank in range(4)]
    assert flat == [Sent(), Sent(0, 1, 4), Sent(), Sent()]
    back = [rows_sent("alltoall", ids, layout, rank, back=True) for rank in range(4)]
    assert back == [Sent(0, 1, 0), Sent(), Sent(0, 0, 2), Sent(0, 0, 2)]
    # To itself (own node, first token), from there to rank 0; twice to rank 3, of which one copy goes on to
    # rank 2 and two stay.
    hops = [rows_sent("two_hop", ids, layout, rank) for rank in range(4)]
    assert hops == [Sent(), Sent(1, 1, 2), Sent(), Sent(2, 1, 0)]
    back = [rows_sent("two_hop", ids, layout, rank, back=True) for rank in range(4)]
    assert back == [Sent(0, 1, 0), Sent(1, 0, 0), Sent(0, 1, 0), Sent(2, 0, 2)]
