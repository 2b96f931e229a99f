"""The rendezvous of a launcher among others: torch's own, over a store of ours.

Machine 0 hosts the store, under the address that all are given as --master. The rest is torch's dynamic
rendezvous: machines join a round until all are there, or at least the fewest that will do and nobody new
came for a while; then they have numbers. A machine that is silent for some seconds is out of the round,
one that comes later waits for the next.

What is added: only machines of this run may join (`same_run`), the state is no pickle (`round_state`), each
round has a fresh store for its ranks on the first machine's address (see `one_machine`), machines have the
order of --node-rank, and the one that ends the run says why.

Machine 0 is the one that the run does not survive: the others wait for it to come back.
"""

import json
import os
import secrets
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
    _NodeDesc,
)

from moe_runtime.cli.supervise.job import Machines
from moe_runtime.cli.supervise.lookout import Lookout, current_state
from moe_runtime.cli.supervise.meeting_place import Change
from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.cli.supervise.round_state import JsonStateHolder
from moe_runtime.cli.supervise.same_run import meet
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.meeting import host_store

_RUN_ID = "moe_runtime"
_HEARTBEAT_S, _MISSED = 1.0, 5
_SILENT_S = _HEARTBEAT_S * _MISSED  # who is silent for so long is gone
_POLL_S, _LINGER_S = 0.2, 5.0
_RANKS, _DONE, _VERDICT, _LEFT = (f"moe_runtime/{word}" for word in ("ranks", "done", "verdict", "left"))


class ManyMachines(RendezvousHandler):
    """A `MeetingPlace` of several launchers.

    Args:
        machines: this one among the others.
        config: of the run, as JSON values.
        timeout_s: for machines to come.
        rejoin_s: to wait for machines that are missing, once the fewest that will do are there.

    Raises:
        ConfigError: this machine does not belong to the run that meets there, or its number is taken.
        PeerLost: machine 0 does not answer.
    """

    def __init__(self, machines: Machines, config: dict[str, Any], timeout_s: float, rejoin_s: float) -> None:
        self._machines, self._config = machines, config
        self._timeout_s, self._rejoin_s = timeout_s, rejoin_s
        self.token, self.attempt = "", 0
        self._world = 0
        self._lookout: Lookout | None = None
        self._left_behind: list[DynamicRendezvousHandler] = []
        self._round: dist.Store | None = None
        self._ranks_store: dist.TCPStore | None = None
        self._open()

    def _open(self) -> None:
        """Reach machine 0, for the first time or again."""
        self._store, self.token = meet(self._machines, self._config, self._timeout_s)
        self._store.set_timeout(timedelta(seconds=_SILENT_S))
        settings = RendezvousSettings(
            _RUN_ID,
            self._machines.least,
            self._machines.most,
            RendezvousTimeout(
                join=timedelta(seconds=self._timeout_s),
                last_call=timedelta(seconds=self._rejoin_s),
                close=timedelta(seconds=_SILENT_S),
                heartbeat=timedelta(seconds=_SILENT_S),
            ),
            keep_alive_interval=timedelta(seconds=_HEARTBEAT_S),
            keep_alive_max_attempt=_MISSED,
        )
        backend = C10dRendezvousBackend(self._store, _RUN_ID)
        holder = JsonStateHolder(backend, settings)
        # Machines are numbered in the order of these names; the last number tells one's lives apart.
        self._node = _NodeDesc(f"{self._machines.rank:06d}", os.getpid(), secrets.randbits(31))
        self._torch = DynamicRendezvousHandler(self._node, settings, "c10d", self._store, holder)
        # torch would make a store for the ranks, on all interfaces.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self._refuse_twin()

    def _leave_behind(self) -> None:
        """Let a rendezvous go whose store does not answer: its heartbeat may hang, and is not waited for."""
        if (timer := self._torch._keep_alive_timer) is not None:
            timer._ctx.stop_event.set()
        self._left_behind.append(self._torch)  # else torch waits for the heartbeat's thread

    def _refuse_twin(self) -> None:
        """Refuse a number that another living machine has; one that has just died is soon forgotten."""
        deadline = time.monotonic() + _SILENT_S + 2 * _HEARTBEAT_S
        while self._has_twin():
            if time.monotonic() > deadline:
                rank = self._machines.rank
                raise ConfigError(f"--node-rank: another machine is number {rank} already; give each its own")
            time.sleep(_HEARTBEAT_S)

    def _has_twin(self) -> bool:
        state = current_state(self._torch)
        present = {*state.participants, *state.wait_list, *state.redundancy_list}
        return any(node.addr == self._node.addr and node != self._node for node in present)

    @property
    def use_agent_store(self) -> bool:
        """Ranks are clients of the store of their round; none of them hosts one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A new round; if machine 0 went, one with its next life."""
        is_lost = self._lookout is not None and self._lookout.end() is Change.LOST
        while True:
            try:
                if is_lost:
                    self._leave_behind()
                    self._open()
                    is_lost = False
                info = self._torch.next_rendezvous()
                self.attempt = self._torch._state_holder.state.round + 1
                self._round, self._world = info.store, info.world_size
                place = self._ranks_place(info)
                self._lookout = Lookout(self._torch, self._node, self._world, _SILENT_S)
                return RendezvousInfo(info.store, info.rank, info.world_size, place)
            except (RendezvousConnectionError, dist.DistError):
                is_lost = True

    def _ranks_place(self, info: RendezvousInfo) -> RendezvousStoreInfo:
        """A store for the ranks of this round, which the first machine hosts."""
        if info.rank == 0:
            self._ranks_store = host_store(self._machines.address, 0, self._timeout_s, self.token)
            info.store.set(_RANKS, json.dumps([self._machines.address, self._ranks_store.port]))
        address, port = json.loads(info.store.get(_RANKS))
        return RendezvousStoreInfo(str(address), int(port))

    def changed(self) -> Change | None:
        """Whether the round is still what it was."""
        assert self._lookout is not None
        return self._lookout.change()

    def all_done(self) -> bool:
        """Wait for the ranks of every machine; False if the round changes before that."""
        assert self._round is not None
        try:
            self._round.add(_DONE, 1)
            while self._round.add(_DONE, 0) < self._world:
                if self.changed():
                    return False
                time.sleep(_POLL_S)
        except dist.DistError:  # machine 0 was the first to see that all are done
            return True
        return True

    def tell(self, outcome: Outcome) -> None:
        """Say how the run ended, once; machine 0 stays until the others have read it."""
        # Over a link that is cut the store does not come back.
        telling = threading.Thread(target=self._tell, args=(outcome,), daemon=True)
        telling.start()
        telling.join(2 * _LINGER_S)

    def _tell(self, outcome: Outcome) -> None:
        try:
            word = {"code": outcome.code, "cause": outcome.cause, "machine": self._machines.rank}
            self._store.compare_set(_VERDICT, "", json.dumps(word))
            self.shutdown()
            self._store.add(_LEFT, 1)
            until = time.monotonic() + _LINGER_S
            while self._machines.rank == 0 and time.monotonic() < until:
                if self._store.add(_LEFT, 0) >= self._world:
                    return
                time.sleep(_POLL_S)
        except (RendezvousError, dist.DistError):
            return

    def told(self) -> Outcome:
        """What the machine that ended the run said."""
        try:
            word = json.loads(self._store.get(_VERDICT))
        except (dist.DistError, RuntimeError, ValueError):
            return Outcome(3, "another machine ended the run")
        cause = f"machine {word['machine']}: {word['cause']}" if word["code"] else ""
        return Outcome(int(word["code"]), cause)

    def get_backend(self) -> str:
        """Name of this kind."""
        return "c10d"

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._torch.is_closed()

    def set_closed(self) -> None:
        """End the run."""
        self._torch.set_closed()

    def num_nodes_waiting(self) -> int:
        """Machines that came after the round had begun."""
        return self._torch.num_nodes_waiting()

    def get_run_id(self) -> str:
        """The run, as torch names it."""
        return _RUN_ID

    def shutdown(self) -> bool:
        """End the run for all, and this machine's part in it."""
        if self._lookout is not None:
            self._lookout.end()
        return self._torch.shutdown()
