"""The state of a rendezvous goes over the network as JSON, and comes back as it was."""

import pickle
from datetime import UTC, datetime

import pytest
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from moe_runtime.cli.supervise.round_state import of_json, to_json


def _state() -> _RendezvousState:
    state = _RendezvousState()
    one, two, three = (_NodeDesc(f"{rank:06d}", 100 + rank, 1) for rank in range(3))
    state.round, state.complete, state.deadline = 7, True, datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)
    state.participants, state.wait_list, state.redundancy_list = {two: 1, one: 0}, {three}, {one}
    state.last_heartbeats = {three: datetime.now(UTC)}
    return state


def test_a_state_comes_back_as_it_was() -> None:
    state = _state()
    assert vars(of_json(to_json(state))) == vars(state)
    empty = _RendezvousState()
    assert vars(of_json(to_json(empty))) == vars(empty)


def test_equal_states_are_equal_bytes() -> None:
    state, other = _state(), _state()
    other.last_heartbeats = state.last_heartbeats
    other.participants = dict(reversed(state.participants.items()))
    assert to_json(state) == to_json(other)


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    "text", [pickle.dumps(_Bomb()), b"", b"{}", b"[]", b"null", b'{"round": "x"}', to_json(_state())[:-2]]
)
def test_anything_else_is_refused_and_not_executed(text: bytes) -> None:
    with pytest.raises(RendezvousStateError):
        of_json(text)
