"""The rendezvous of a launcher that has no other to wait for: a fresh store for each attempt.

A store is never used twice. With gloo, ranks of a second attempt would read from it the addresses that
the dead ones left, and fail to connect.
"""

import secrets

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from moe_runtime.cli.supervise.meeting_place import Change
from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.parallel.meeting import host_store

_LOOPBACK = "127.0.0.1"


class OneMachine(RendezvousHandler):
    """A `MeetingPlace` that gives the ranks of this machine a store on loopback.

    Args:
        timeout_s: of the store's operations.
    """

    def __init__(self, timeout_s: float) -> None:
        self.token, self.attempt = secrets.token_hex(16), 0
        self._timeout_s = timeout_s
        self._store: dist.TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the store; none of them hosts one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A new attempt, with a new store on a new port."""
        self.attempt += 1
        self._store = host_store(_LOOPBACK, 0, self._timeout_s, self.token)
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_LOOPBACK, self._store.port))

    def changed(self) -> Change | None:
        """Nothing changes."""
        return None

    def all_done(self) -> bool:
        """The ranks of this machine were all."""
        return True

    def tell(self, outcome: Outcome) -> None:
        """Nobody to tell."""

    def told(self) -> Outcome:
        """Nobody else ends the run."""
        raise AssertionError("one machine has no other that ends its run")

    def get_backend(self) -> str:
        """Name of this kind."""
        return "one_machine"

    def is_closed(self) -> bool:
        """Never: nobody else could close it."""
        return False

    def set_closed(self) -> None:
        """Nothing to do."""

    def num_nodes_waiting(self) -> int:
        """No other machine ever comes."""
        return 0

    def get_run_id(self) -> str:
        """The run, as torch names it."""
        return self.token

    def shutdown(self) -> bool:
        """Let the store go."""
        self._store = None
        return True
