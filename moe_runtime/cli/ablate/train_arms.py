"""Trains what a study lacks: each run a `train` command of its own, some side by side.

A run lies in OUT/KEY, so that the same run of another study is found there, and a command that was
interrupted goes on from its checkpoints. A run that has ended is measured, in a process of its own too: what
goes wrong in one run leaves the others alone. Ctrl-C and SIGTERM reach the runs, which save and end.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moe_runtime.cli.ablate.study import PlannedRun
from moe_runtime.errors import MoeRuntimeError

MEASURED = "result.json"
LOG = "ablate.log"
_MEASURE = "import sys; from pathlib import Path; from moe_runtime.cli.ablate.measure import write_result; "
_MEASURE += "write_result(Path(sys.argv[1]), Path(sys.argv[2]))"


class RunFailed(MoeRuntimeError):
    """A run of a study ended with an error."""

    exit_code = 1


def overrides_of(run: PlannedRun, out: Path) -> list[str]:
    """What makes a run of its base config: the arm's overrides, and the folder OUT/KEY."""
    return [*run.overrides, f'name="{run.key}"', f"out_dir={out}"]  # quoted: a key may be digits alone


class Trainer:
    """Runs of a study, at most `jobs` at a time.

    Args:
        out: folder of the run folders.
        jobs: runs side by side; the cores are shared out evenly.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self._out, self._jobs = out, jobs
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, runs: list[PlannedRun], done: Callable[[PlannedRun, Path], None]) -> None:
        """Train and measure all of them; `done(run, result file)` is called in this thread after each.

        Raises:
            RunFailed: after all others have ended; names the runs and where they say why.
        """
        failed = []
        with self._signals_passed_on(), ThreadPoolExecutor(self._jobs) as pool:
            started = {pool.submit(self._one, run): run for run in runs}
            for future in as_completed(started):
                try:
                    result = future.result()
                except RunFailed as error:
                    failed.append(str(error))
                else:
                    if result is not None:
                        done(started[future], result)
        if self._stopped:
            raise KeyboardInterrupt
        if failed:
            raise RunFailed("\n".join(failed))

    def _one(self, run: PlannedRun) -> Path | None:
        """The file with a run's result; None if it was stopped."""
        folder = self._out / run.key
        result = folder / MEASURED
        if not result.exists():
            train = ["-m", "moe_runtime.cli.launch", "train", str(run.base), *overrides_of(run, self._out)]
            for command in (train, ["-c", _MEASURE, str(folder), str(result)]):
                if self._stopped or not self._call(run, command, folder):
                    return None
        return result

    def _call(self, run: PlannedRun, arguments: list[str], folder: Path) -> bool:
        """True if a command of a run ended well, False if it was stopped."""
        folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with (folder / LOG).open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
            )
            with self._lock:
                self._running.add(process)
                if self._stopped:
                    process.send_signal(signal.SIGTERM)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code != 0 and not self._stopped:
            raise RunFailed(f"arm {run.arm}, seed {run.seed}: ended with code {code}; see {folder / LOG}")
        return not self._stopped

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stopped = True
            for process in list(self._running):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
