"""Sees whether machines came or went while a round lasts.

A thread of its own asks the store: where a link is cut, a call into torch's store comes back when the
kernel gives the connection up, after a quarter of an hour. So what counts is the age of the last answer, and
a thread that is never answered again is left behind, with its connection.
"""

import threading
import time

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    _NodeDesc,
    _RendezvousState,
)

from moe_runtime.cli.supervise.meeting_place import Change

_LOOK_S = 0.5


def current_state(handler: DynamicRendezvousHandler) -> _RendezvousState:
    """The state of a rendezvous as the store has it now."""
    handler.num_nodes_waiting()
    return handler._state_holder.state


class Lookout:
    """Watches one round.

    Args:
        handler: of this machine.
        node: this machine in it.
        world: machines of the round.
        silent_s: a store that does not answer for so long is lost.
    """

    def __init__(
        self, handler: DynamicRendezvousHandler, node: _NodeDesc, world: int, silent_s: float
    ) -> None:
        self._handler, self._node, self._world, self._silent_s = handler, node, world, silent_s
        self._seen: Change | None = None
        self._answered_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)
        self._thread.start()

    def change(self) -> Change | None:
        """Whether the round is still what it was."""
        if time.monotonic() - self._answered_s > self._silent_s:
            return Change.LOST
        return self._seen

    def end(self) -> Change | None:
        """Look no longer; gives what was seen last."""
        self._ended.set()
        self._thread.join(2 * _LOOK_S)
        return self.change()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                self._seen = self._judge(current_state(self._handler))
            except (RendezvousError, dist.DistError, RuntimeError):
                self._seen = Change.LOST
                return
            self._answered_s = time.monotonic()

    def _judge(self, state: _RendezvousState) -> Change | None:
        if state.closed:
            return Change.CLOSED
        if len(state.participants) < self._world or self._node not in state.participants:
            return Change.LEFT
        return Change.CAME if state.wait_list else None
