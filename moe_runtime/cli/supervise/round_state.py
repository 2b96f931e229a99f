"""The shared state of a rendezvous, as JSON.

torch's holder of this state keeps it in the store as a pickle, and a pickle from a store that knows no
passwords is code that anybody on the network may have this process execute. The state is a handful of names,
numbers and times, so here it goes as JSON; all else of torch's holder stays, such as who is dead.
"""

import json
from datetime import UTC, datetime
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    _BackendRendezvousStateHolder,
    _NodeDesc,
    _RendezvousState,
)


def to_json(state: _RendezvousState) -> bytes:
    """The state in words; machines in order, so that equal states are equal bytes."""
    rows = sorted(state.participants.items(), key=lambda row: _key(row[0]))
    beats = sorted(state.last_heartbeats.items(), key=lambda row: _key(row[0]))
    words = {
        "round": state.round,
        "complete": state.complete,
        "closed": state.closed,
        "deadline": None if state.deadline is None else state.deadline.timestamp(),
        "participants": [[*_key(node), rank] for node, rank in rows],
        "waiting": sorted(map(_key, state.wait_list)),
        "redundant": sorted(map(_key, state.redundancy_list)),
        "heartbeats": [[*_key(node), time.timestamp()] for node, time in beats],
    }
    return json.dumps(words).encode()


def of_json(text: bytes) -> _RendezvousState:
    """The state that was written.

    Raises:
        RendezvousStateError: it is something else.
    """
    state = _RendezvousState()
    try:
        words: dict[str, Any] = json.loads(text)
        state.round, state.complete = int(words["round"]), bool(words["complete"])
        state.closed = bool(words["closed"])
        state.deadline = None if words["deadline"] is None else _time(words["deadline"])
        state.participants = {_node(row[:3]): int(row[3]) for row in words["participants"]}
        state.wait_list = {_node(row) for row in words["waiting"]}
        state.redundancy_list = {_node(row) for row in words["redundant"]}
        state.last_heartbeats = {_node(row[:3]): _time(row[3]) for row in words["heartbeats"]}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RendezvousStateError(f"the rendezvous holds no state of ours: {text[:80]!r}") from error
    return state


def _key(node: _NodeDesc) -> tuple[str, int, int]:
    return node.addr, node.pid, node.local_id


def _node(row: Any) -> _NodeDesc:
    return _NodeDesc(str(row[0]), int(row[1]), int(row[2]))


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class JsonStateHolder(_BackendRendezvousStateHolder):
    """torch's holder, which writes and reads JSON.

    Changes made here are kept by the next `sync` unless another machine was faster.
    """

    def sync(self) -> bool | None:
        """Write the state if it was changed, and take what is there; whether the write won."""
        has_set: bool | None = None
        if self._dirty:
            answer = self._backend.set_state(to_json(self._state), self._token)
            found, has_set = (None, False) if answer is None else (answer[:2], answer[2])
        else:
            found = self._backend.get_state()
        text, self._token = (None, None) if found is None else found
        self._state = _RendezvousState() if text is None else of_json(text)
        self._dirty = False
        self._sanitize()
        return has_set
