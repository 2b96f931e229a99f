"""Finds the rank that holds the others up, if one does.

In a pipeline one stuck rank stands all the others still, so being late proves nothing. In this order:

    stopped    the kernel has stopped the process
    silent     its heartbeat has ended, although it was given processors: its interpreter is locked
    stuck      it passes no marks for longer than its phase may, and does not wait for others
    deadlock   all ranks of the run wait for each other

Of several stuck ranks the one whose last mark is the oldest is named. A rank that only waits is never named.
Where ranks of other machines belong to the run and all here only wait, the culprit is there, and the watch of
that machine names it.

Limits are by phase (`reliability.limits`), between marks, not steps. What comes in every step allows two
missed beats; elsewhere (start, first step, saving) the interpreter may be locked as long as the phase may
take: libraries are loaded and kernels compiled there.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_runtime.cli.supervise.stacks import ask_for_stacks, only_waits, stacks_file
from moe_runtime.config.reliability import ReliabilityConfig
from moe_runtime.parallel.beat import Beat, read_beat
from moe_runtime.parallel.starved import starved_s

_MISSED_BEATS = 2
_STACKS_S = 0.3  # a signal handler in C has written by then
_LATE_STACKS_S = 2.0  # one that has no processor answers later; one that the kernel holds never does
_OVERSLEPT_S = 5.0
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_RECURRING = ("data", "step", "optimizer")
_HOW = {
    "stopped": "stopped by a signal",
    "silent": "silent: its interpreter is locked",
    "stuck": "stuck: it waits for no other rank",
    "deadlock": "deadlock: all ranks wait for each other",
}
_ACTION = re.compile(r"\d+[A-Z]+(\d+)")


@dataclass(frozen=True)
class Verdict:
    """The rank that holds the others up.

    Args:
        rank: global.
        phase, action, step: of its last mark.
        microbatch: that it was in; None outside of a program.
        seconds: since its last mark.
        kind: stopped, silent, stuck or deadlock.
        text: all of it in one line.
    """

    rank: int
    phase: str
    action: str
    microbatch: int | None
    step: int
    seconds: float
    kind: str
    text: str


@dataclass
class _Seen:
    """What the watch remembers of a rank."""

    stopped_at: float | None = None
    beaten_s: float = 0.0
    beat_starved_s: float = 0.0  # when that beat was seen
    count: int = -1
    mark_starved_s: float = 0.0  # when that mark was seen


class HangWatch:
    """Watches the ranks of this machine; one for each attempt.

    Args:
        status_dir: where their heartbeats are.
        pids: process of each rank of this machine.
        reliability: limits, and how often hearts beat.
        watchdog_s: limit of a part of a program.
        world_size: ranks of the run on all machines; None: no others.
        now: monotonic seconds.
    """

    def __init__(
        self,
        status_dir: Path,
        pids: Mapping[int, int],
        reliability: ReliabilityConfig,
        watchdog_s: float,
        world_size: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status_dir, self.pids = status_dir, dict(pids)
        self._beat_s, self._limits, self._watchdog_s = reliability.heartbeat_s, reliability.limits, watchdog_s
        self._is_all = world_size is None or world_size == len(self.pids)
        self._now = now
        self._began = self._looked = now()
        self._patient_until = 0.0
        self._seen = {rank: _Seen() for rank in self.pids}
        self._processes: dict[int, psutil.Process] = {}
        self._asked: dict[int, int] = {}  # count of marks of the ranks asked for stacks
        self._asked_at = 0.0

    def look(self) -> Verdict | None:
        """Who holds the others up; call it several times in a heartbeat."""
        now = self._now()
        if now - self._looked > _OVERSLEPT_S:  # this process itself stood still, and the ranks may have too
            self._patient_until = now + (_MISSED_BEATS + 1) * self._beat_s
        self._looked = now
        beats = self.beats()
        found = self._stopped(beats, now) or self._silent(beats, now)
        if now < self._patient_until:
            return None
        return found or self._stuck(beats, now)

    def beats(self) -> dict[int, Beat]:
        """The newest beat of each rank that has begun and not ended."""
        live = [rank for rank in self.pids if self._status(rank) not in _DEAD]
        read = {rank: read_beat(self.status_dir / f"rank{rank}.heartbeat") for rank in live}
        return {rank: beat for rank, beat in read.items() if beat is not None}

    def limit_s(self, beat: Beat) -> float:
        """Seconds that a rank may stay where it is."""
        limits = self._limits
        phase = "evaluate" if beat.phase == "sample" else beat.phase
        limit: float = self._watchdog_s if phase == "step" else getattr(limits, phase)
        is_first = beat.is_first_step and phase in _RECURRING
        return max(limit, limits.first_step) if is_first else limit

    def _stopped(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        for rank in self.pids:
            seen = self._seen[rank]
            if self._status(rank) not in _STOPPED:
                seen.stopped_at = None
            elif seen.stopped_at is None:
                seen.stopped_at = now
            elif now - seen.stopped_at > _MISSED_BEATS * self._beat_s:
                return self._verdict("stopped", rank, beats.get(rank), now)
        return None

    def _silent(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        for rank, beat in beats.items():
            seen = self._seen[rank]
            if beat.beaten_s != seen.beaten_s:
                seen.beaten_s, seen.beat_starved_s = beat.beaten_s, starved_s(beat.pid, beat.native_ids)
                continue
            is_recurring = beat.phase in _RECURRING and not beat.is_first_step
            limit = _MISSED_BEATS * self._beat_s if is_recurring else self.limit_s(beat)
            if seen.stopped_at is None and now - beat.beaten_s > limit:
                starved = starved_s(beat.pid, beat.native_ids) - seen.beat_starved_s
                if now - beat.beaten_s - starved > limit:
                    return self._verdict("silent", rank, beat, now)
        return None

    def _stuck(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        for rank in self.pids:
            if rank not in beats and now - self._began > self._limits.start:
                return self._verdict("stuck", rank, None, now)
        late = {rank: beat for rank, beat in beats.items() if self._is_late(rank, beat, now)}
        if not late:
            return None
        waits = {rank: self._waits(rank, beat) for rank, beat in beats.items()} if self._asked_at else {}
        patience_s = max(_LATE_STACKS_S if None in waits.values() else 1.0, self._beat_s)
        if not self._asked_at or now - self._asked_at > patience_s + _STACKS_S:
            ask_for_stacks(self.status_dir, beats.items())
            self._asked_at, self._asked = now, {rank: beat.count for rank, beat in beats.items()}
            return None
        if now - self._asked_at < (patience_s if None in waits.values() else _STACKS_S):
            return None
        still = {rank: beat for rank, beat in beats.items() if self._asked.get(rank) == beat.count}
        busy = {rank: beat for rank, beat in still.items() if not waits[rank]}
        culprits = {rank: beat for rank, beat in busy.items() if rank in late}
        if culprits:
            rank = min(culprits, key=lambda rank: culprits[rank].marked_s)
            return self._verdict("stuck", rank, culprits[rank], now)
        return self._deadlock(still if not busy else {}, now)

    def _status(self, rank: int) -> str:
        try:
            process = self._processes.get(rank) or psutil.Process(self.pids[rank])
            self._processes[rank] = process
            return process.status()
        except psutil.NoSuchProcess:
            return psutil.STATUS_DEAD

    def _deadlock(self, waiting: Mapping[int, Beat], now: float) -> Verdict | None:
        """All wait, and for twice as long as they may: one may just have been between two waits."""
        if not self._is_all or len(waiting) < len(self.pids):
            return None
        if any(now - beat.marked_s < 2 * self.limit_s(beat) for beat in waiting.values()):
            return None
        rank = min(waiting, key=lambda rank: waiting[rank].marked_s)
        return self._verdict("deadlock", rank, waiting[rank], now)

    def _is_late(self, rank: int, beat: Beat, now: float) -> bool:
        """Whether it stays where it is for longer than it may; time without a processor does not count."""
        seen, own = self._seen[rank], beat.native_ids[:1]
        if seen.count != beat.count:
            seen.count, seen.mark_starved_s = beat.count, starved_s(beat.pid, own)
        seconds, limit = now - beat.marked_s, self.limit_s(beat)
        return seconds > limit and seconds - (starved_s(beat.pid, own) - seen.mark_starved_s) > limit

    def _waits(self, rank: int, beat: Beat) -> bool | None:
        file = stacks_file(self.status_dir, rank)
        return only_waits(file.read_text(errors="replace"), beat.thread) if file.exists() else None

    def _verdict(self, kind: str, rank: int, beat: Beat | None, now: float) -> Verdict:
        seconds = now - (beat.marked_s if beat else self._began)
        step, phase, action = (beat.step, beat.phase, beat.action) if beat else (0, "start", "")
        place = ", ".join(filter(None, (f"step {step}" if step else "", phase, action)))
        text = f"rank {rank} makes no progress: {place}, for {seconds:.0f} s; {_HOW[kind]}"
        return Verdict(rank, phase, action, microbatch_of(action), step, seconds, kind, text)


def microbatch_of(action: str) -> int | None:
    """The microbatch of an action such as `3F5+4B1', combine_b layers.3`: 1, for the part is a backward's."""
    entry, _, part = action.partition(", ")
    found = _ACTION.findall(entry)
    is_backward = part.partition(" ")[0].endswith(("_b", "_w"))
    return int(found[-1 if is_backward else 0]) if found else None
