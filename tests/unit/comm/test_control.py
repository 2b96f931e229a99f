"""What ranks tell each other before rows travel."""

import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from moe_comm.control import (
    DTYPES,
    HEADER_SIZE,
    OPENING,
    OPERATIONS,
    Control,
    Statement,
    agree_on_opening,
    check_bound,
)
from moe_comm.errors import CountMismatch, InputError, PlacementError, RankDisagreement, ReceiveOverflow
from moe_comm.placement import Placement
from moe_comm.traffic import Traffic, TrafficMeter

from tests.unit.comm.thread_transport import ThreadTransport, run_threads

SIZE = 3


def _control(transport: ThreadTransport, width: int = 2) -> Control:
    placement = Placement(SIZE, SIZE, transport.rank, ranks_per_node=2)
    return Control(transport, TrafficMeter(placement), width)


def _no_objection() -> None:
    return None


def test_every_pair_of_different_statements_is_told_apart():
    statements = [
        Statement(operation, number, 4, dtype, weight_dtype, top_k, of)
        for operation in OPERATIONS[:2]
        for number in (0, 1)
        for dtype in DTYPES[:2]
        for weight_dtype in DTYPES[1:3]
        for top_k in (0, 2)
        for of in (0, 1)
    ]
    headers = [tuple(statement.header()) for statement in statements]
    assert len(set(headers)) == len(headers)
    assert {len(header) for header in headers} == {HEADER_SIZE}


def test_each_rank_hears_the_counts_that_are_for_it():
    def talk(transport: ThreadTransport):
        control, rank = _control(transport), transport.rank
        statement = control.state("dispatch", torch.zeros(4, 5), torch.zeros(4, 2), _no_objection)
        counts = torch.tensor([[100 * rank + d, -1] for d in range(SIZE)])
        return *control.agree(statement, counts), control._traffic.snapshot()

    for rank, (said, heard, traffic) in enumerate(run_threads(talk, SIZE)):
        assert said.tolist() == [[100 * rank + d, -1] for d in range(SIZE)]
        assert heard.tolist() == [[100 * s + rank, -1] for s in range(SIZE)]
        near, message = (1 if rank < 2 else 0), 8 * (HEADER_SIZE + 2)
        assert traffic == Traffic(
            control_bytes_intra=near * message, control_bytes_inter=(2 - near) * message
        )


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"rows": torch.zeros(4, 6)}, "got hidden 5 of .* rank 0 and hidden 6 of .* on rank 2"),
        ({"rows": torch.zeros(4, 5).half()}, "torch.float32 with .* rank 0 and hidden 5 of torch.float16"),
        ({"weights": torch.zeros(4, 2).double()}, "weights of torch.float32 .* weights of torch.float64"),
        ({"weights": torch.zeros(4, 1)}, "for 2 choices on .* for 1 choices on rank 2"),
        ({"operation": "combine"}, "dispatch as operation 0 on .* and combine as operation 0 on rank 2"),
        ({"of_dispatch": 3}, "handle of operation 0 on .* handle of operation 3 on rank 2"),
    ],
)
def test_all_ranks_hear_of_a_difference_and_agree_again_afterwards(odd, words):
    def talk(transport: ThreadTransport):
        control = _control(transport)
        fine = {"operation": "dispatch", "rows": torch.zeros(4, 5), "weights": torch.zeros(4, 2)}
        mine = fine | (odd if transport.rank == 2 else {})
        mine["handle"] = SimpleNamespace(number=mine.pop("of_dispatch", 0), origin=control)
        if "of_dispatch" in odd:
            mine["operation"] = "combine"
        with pytest.raises(RankDisagreement) as raised:
            control.agree(control.state(mine.pop("operation"), check=_no_objection, **mine))
        control.agree(control.state(**fine, check=_no_objection))
        return str(raised.value)

    messages = run_threads(talk, SIZE)
    own = "combine" if "of_dispatch" in odd else odd.get("operation", "dispatch")
    pattern = f"^(dispatch|{own}): expected the same of all ranks, .*{words}"
    for message in messages:
        assert isinstance(message, str) and re.search(pattern, message), repr(message)


def test_a_refusal_is_raised_by_its_rank_and_named_to_the_others():
    def object_to_it() -> None:
        raise InputError("planted")

    def talk(transport: ThreadTransport):
        control = _control(transport)
        check = object_to_it if transport.rank in (0, 2) else _no_objection
        # A refused input may be anything: it is not looked at.
        rows = None if transport.rank == 0 else torch.zeros(4, 5)
        handle = SimpleNamespace(number=0, origin=control)
        control.agree(control.state("combine", rows, None, check, handle))

    first, second, third = run_threads(talk, SIZE)
    assert isinstance(first, InputError) and isinstance(third, InputError)
    assert isinstance(second, RankDisagreement)
    assert str(second).startswith("combine: expert-parallel ranks [0, 2] refused")


def test_on_a_device_only_the_own_refusal_is_raised_and_nothing_is_sent():
    def talk(transport: ThreadTransport):
        control, device = _control(transport), torch.device("cuda")
        control.confirm(Statement("combine", 0, device=device))
        if transport.rank == 1:
            control.refuse(Statement("combine", 1, device=device, refusal=CountMismatch("planted")))
        return control._traffic.snapshot()

    results = run_threads(talk, SIZE)
    assert isinstance(results[1], CountMismatch)
    assert results[0] == results[2] == Traffic()


@pytest.mark.parametrize("handle", [None, 3, SimpleNamespace(number=0, origin=object())])
def test_a_handle_of_somebody_else_is_refused(handle):
    control = run_threads(_control, 1)[0]
    statement = control.state("combine", torch.zeros(4, 5), None, _no_objection, handle)
    assert isinstance(statement.refusal, InputError)
    assert "combine: expected a handle of this dispatcher, got" in str(statement.refusal)


@pytest.mark.parametrize(
    ("rows_sent", "lanes", "most", "words"),
    [
        ([[0, 0, 0, 9], [0, 0, 0, 1], [0, 3, 0, 0], [0, 0, 0, 0]], 1, 10, "10 to receive for .* rank 3;"),
        ([[2, 2, 2, 2], [0, 0, 0, 3], [0, 3, 0, 0], [0, 0, 0, 0]], 1, 8, "8 to send for .* rank 0;"),
        # Of the second lane of node 0, for both ranks of node 1, and of the same lane of node 1.
        ([[0, 0, 0, 0], [0, 0, 4, 3], [0, 3, 0, 0], [0, 0, 3, 3]], 2, 13, "13 to pass on for .* rank 3;"),
    ],
)
def test_the_bound_is_on_what_a_rank_sends_passes_on_and_receives(rows_sent, lanes, most, words):
    table = torch.tensor(rows_sent)
    check_bound(table, most, lanes)
    with pytest.raises(ReceiveOverflow, match=words):
        check_bound(table, most - 1, lanes)


def test_an_overflow_carries_its_table():
    rows_sent = torch.tensor([[5, 0, 9], [0, 1, 8], [5, 0, 0]])
    check_bound(rows_sent, None)
    with pytest.raises(ReceiveOverflow, match=r"max_rows 16 rows on a rank, got 17 .* rank 2;") as raised:
        check_bound(rows_sent, 16)
    rows_sent.zero_()
    between_processes = pickle.loads(pickle.dumps(raised.value))
    assert str(between_processes) == str(raised.value)
    assert torch.equal(between_processes.rows_sent, raised.value.rows_sent)
    assert raised.value.rows_sent.tolist() == [[5, 0, 9], [0, 1, 8], [5, 0, 0]]


@pytest.mark.parametrize("name", OPENING)
def test_ranks_that_open_other_dispatchers_are_told_what_differs(name):
    alike = {"kind": 1, "number of experts": 6, "wire": 2, "max_rows": -1}

    def talk(transport: ThreadTransport):
        agree_on_opening(transport, alike)
        agree_on_opening(transport, alike | ({name: number} if transport.rank == 1 else {}))

    number, word = {"kind": (2, "two_hop"), "wire": (3, "fp8")}.get(name, (17, "17"))
    for error in run_threads(talk, SIZE):
        assert isinstance(error, PlacementError), repr(error)
        assert f"expected the same {name} on all ranks" in str(error), error
        assert f"{word} on rank 1" in str(error), error
