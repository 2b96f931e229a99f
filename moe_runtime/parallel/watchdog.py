"""Says what every rank is doing when one of them makes no progress.

In a pipeline one stuck rank stands all the others still, each in another place, and a time-out of a
collective names only where its own rank waited. So a thread beside each rank's own tells a shared store,
some times within the limit, what its rank is doing and for how long. When a rank has been in one phase for
nearly the limit, whoever finds it first prints one report of all ranks; a rank that has told nothing
meanwhile has stopped or is gone, which is then the finding.

The report ends nothing: a slow phase may end yet. What ends a run is the time limit of its collectives
(`train.peer_timeout_s`).
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from moe_runtime.parallel.clock import Clock

_TICKS = 8  # looks within the limit; the report comes one of them before its end


class Watchdog:
    """Watches one rank while the context is open.

    Args:
        store: that all ranks share.
        clock: of the rank.
        rank, world_size: global.
        place: what the rank is in the layout, such as `pp 0, dp 1`.
        limit_s: seconds in one phase after which it is stuck.
        say: where the report goes.
    """

    def __init__(
        self,
        store: dist.Store,
        clock: Clock,
        rank: int,
        world_size: int,
        place: str,
        limit_s: float,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._store = dist.PrefixStore("watchdog", store)
        self._clock, self._rank, self._world_size = clock, rank, world_size
        self._place, self._limit_s, self._say = place, limit_s, say
        self._ended = threading.Event()
        self._reported_since = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self._limit_s)

    def _watch(self) -> None:
        tick_s = self._limit_s / _TICKS
        while not self._ended.wait(tick_s):
            try:
                self._look(tick_s)
            except RuntimeError:  # the store is gone, and with it the run
                return

    def _look(self, tick_s: float) -> None:
        progress = self._clock.progress
        doing, phase, since = progress.entry, progress.part, progress.since
        waited_s = time.perf_counter() - since
        word = {"place": self._place, "doing": doing, "phase": phase, "for_s": waited_s, "at": time.time()}
        self._store.set(f"rank{self._rank}", json.dumps(word))
        is_stuck = bool(doing) and waited_s > self._limit_s - 2 * tick_s
        if is_stuck and since != self._reported_since:
            self._reported_since = since
            # One report for all that are stuck together: they noticed within one limit.
            if self._store.add(f"report{int(time.time() / self._limit_s)}", 1) == 1:
                self._ended.wait(tick_s)  # let the others tell where they are
                self._say(self._report(waited_s))

    def _report(self, waited_s: float) -> str:
        head = f"no progress on rank {self._rank} for {waited_s:.0f} s; what each rank does:"
        return "\n".join([head, *(f"  {self._line(rank)}" for rank in range(self._world_size))])

    def _line(self, rank: int) -> str:
        if not self._store.check([f"rank{rank}"]):
            return f"rank {rank}: has not begun"
        word: dict[str, Any] = json.loads(self._store.get(f"rank{rank}"))
        where = f"rank {rank} ({word['place']})"
        silent_s = time.time() - word["at"]
        if silent_s > self._limit_s / 3:
            last = ", ".join(filter(None, (word["doing"], word["phase"]))) or "outside of a program"
            return f"{where}: no word for {silent_s:.0f} s, stopped or gone; its last: {last}"
        if not word["doing"]:
            return f"{where}: outside of a program"
        phase = f", {word['phase']}" if word["phase"] else ""
        return f"{where}: {word['doing']}{phase}, for {word['for_s'] + silent_s:.0f} s"
