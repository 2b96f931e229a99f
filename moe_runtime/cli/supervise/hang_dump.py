"""One folder with all that is known of a hang, taken while the ranks still live.

verdict.json       who was named, and why
ranks.json         the last heartbeat of every rank of this machine
rank{R}.stacks     what each of its threads was in
rank{R}.flight     its newest collectives, where its interpreter could still write them
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from moe_runtime.cli.supervise.hang import HangWatch, Verdict
from moe_runtime.cli.supervise.stacks import ask_for_stacks, stacks_file
from moe_runtime.parallel.beat import Beat
from moe_runtime.parallel.heartbeat import DUMP_FILE

_TICK_S = 0.05
_STACKS_S = 1.0


def dump_hang(watch: HangWatch, verdict: Verdict, into: Path, beat_s: float) -> None:
    """Write the folder; takes up to a second and one and a half heartbeats.

    A stopped rank runs for a moment, until its stacks are written, and is stopped again.

    Args:
        into: made, with its parents.
        beat_s: seconds between heartbeats; flight records come with the next one.

    Raises:
        OSError: it cannot be written.
    """
    into.mkdir(parents=True, exist_ok=True)
    beats, now = watch.beats(), time.monotonic()
    (watch.status_dir / DUMP_FILE).touch()
    ask_for_stacks(watch.status_dir, beats.items())
    stopped = [verdict.rank] if verdict.kind == "stopped" and verdict.rank in beats else []
    _signal(stopped, beats, signal.SIGCONT)
    _await([stacks_file(watch.status_dir, rank) for rank in beats], _STACKS_S)
    _signal(stopped, beats, signal.SIGSTOP)
    _await([_flight(watch.status_dir, rank) for rank in beats if rank != verdict.rank], 1.5 * beat_s)
    for rank in beats:
        for file in (stacks_file(watch.status_dir, rank), _flight(watch.status_dir, rank)):
            if file.exists():
                shutil.copy(file, into / file.name)
    (into / "verdict.json").write_text(json.dumps(asdict(verdict), indent=1))
    (into / "ranks.json").write_text(json.dumps(_table(beats, now), indent=1))


def _table(beats: Mapping[int, Beat], now: float) -> dict[str, dict[str, object]]:
    """Every rank's last word, with its age in seconds."""
    return {
        f"rank{rank}": {
            "pid": beat.pid,
            "step": beat.step,
            "phase": beat.phase,
            "action": beat.action,
            "marks": beat.count,
            "since_mark_s": round(now - beat.marked_s, 3),
            "since_beat_s": round(now - beat.beaten_s, 3),
        }
        for rank, beat in sorted(beats.items())
    }


def _flight(status_dir: Path, rank: int) -> Path:
    return status_dir / f"rank{rank}.flight"


def _signal(ranks: list[int], beats: Mapping[int, Beat], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(beats[rank].pid, number)


def _await(files: list[Path], seconds: float) -> None:
    """Until all files have something in them, or the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(file.exists() and file.stat().st_size for file in files):
        time.sleep(_TICK_S)
