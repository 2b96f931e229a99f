"""W&B as one more reader of the records, which can fail in any way without training noticing.

Everything W&B does happens on one thread of its own, fed by a queue: importing it, opening the run,
logging, drawing, finishing. A service that hangs or dies, a full disk, a missing key, package or network
therefore cost a warning, never a step and never a wait. Failing with a time limit inside the training
thread was rejected: every step after a hang would pay the limit again.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from numpy.typing import ArrayLike

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.metrics.spacing import Spacing
from moe_runtime.metrics.wandb_run import Mode, RunPlace, WandbRun, end_session, kept_id, open_run

_QUEUE_ITEMS = 10_000

Job = Callable[[WandbRun], None]


class WandbSink:
    """Copies records to a W&B run in `run_dir/wandb`.

    Args:
        run_dir: the run folder; the run's id is kept there, so that a resumed run goes on as the same.
        config: what W&B shows as the run's configuration.
        name, project: as W&B shows them.
        mode: `online` falls back to offline when there is no key or no network.
        earlier: events of samples and alerts that earlier parts of the run have logged.
        finish_timeout_s: how long `close` waits; then W&B's service is killed, for its own exit hook
            would wait for it without limit.

    W&B has one session per process; closing the sink ends it.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        name: str,
        project: str,
        mode: Mode,
        earlier: Sequence[Mapping[str, Any]] = (),
        finish_timeout_s: float = 15.0,
    ) -> None:
        self._run_dir, self._config = run_dir, config
        self._name, self._project, self._mode = name, project, mode
        self._earlier, self._finish_timeout_s = earlier, finish_timeout_s
        self._queue: queue.Queue[Job | None] = queue.Queue(_QUEUE_ITEMS)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._spacing = Spacing()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Queue one record, a line of metrics.jsonl."""
        self._put(lambda run: run.log(record, step))

    def sample(self, step: int, text: str) -> None:
        """Queue a generated text."""
        self._put(lambda run: run.sample(step, text))

    def alert(self, event: Mapping[str, Any]) -> None:
        """Queue an event of kind `alert`; W&B tells people of it if its action is `wandb`."""
        self._put(lambda run: run.alert(event))

    def heatmap(self, step: int, layers: Sequence[str], load: ArrayLike) -> None:
        """Queue a picture of the load of every expert, unless the last one is new enough.

        Args:
            load: [layers, experts], relative to a fair share; not changed afterwards.
        """
        if self._spacing.admits(step):
            self._put(lambda run: run.heatmap(step, layers, load))

    def timeline(self, step: int, draw: Callable[[], str]) -> None:
        """Queue the drawing of a step's pipeline timeline.

        Args:
            draw: gives it as SVG; called on the sink's thread.
        """

        def log_drawing(run: WandbRun) -> None:
            try:
                svg = draw()
            except MoeRuntimeError as error:  # a trace that lacks a part; the run goes on without a drawing
                self._warnings.put(f"W&B has no timeline of step {step}: {error}")
            else:
                run.timeline(step, svg)

        self._put(log_drawing)

    def take_warning(self) -> str | None:
        """A warning that has not been taken yet, one line."""
        try:
            return self._warnings.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Finish the run and W&B's session, within a time limit."""
        self._put(None)
        self._thread.join(self._finish_timeout_s)
        if self._thread.is_alive():
            self._give_up(f"did not finish within {self._finish_timeout_s:.0f} s")
            _kill_service()
            self._thread.join(1.0)

    def _put(self, item: Job | None) -> None:
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"fell {_QUEUE_ITEMS} records behind")

    def _give_up(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            line = " ".join(reason.split())[:300]
            self._warnings.put(
                f"W&B is off from here: {line}; metrics.jsonl has everything, and `moe-runtime metrics sync "
                f"{self._run_dir}` makes a W&B run of it"
            )

    def _work(self) -> None:
        try:
            run = self._open()
            while not self._failed.is_set() and (item := self._queue.get()) is not None:
                item(run)
            run.finish()
        except BaseException as error:  # a thread has nobody to raise to; W&B may even raise SystemExit
            self._give_up(f"{type(error).__name__}: {error}")
        try:
            end_session()
        except BaseException as error:  # a dead service cannot be told to end; its hook is gone by now
            self._give_up(f"{type(error).__name__}: {error}")

    def _open(self) -> WandbRun:
        run_id = kept_id(self._run_dir)
        place = RunPlace(self._run_dir, self._config, self._name, self._project, run_id)
        if self._mode == "offline":
            return open_run(place, "offline", self._earlier)
        try:
            return open_run(place, "online")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self._warnings.put(f"W&B records offline: {reason}; `wandb sync` sends it later")
            end_session()  # the service keeps the id of a run that it could not open
            return open_run(place, "offline", self._earlier)


def _kill_service() -> None:
    """Kill the service that W&B started under this process."""
    for child in psutil.Process().children(recursive=True):
        try:
            if "wandb-core" in " ".join(child.cmdline()):
                child.kill()
        except psutil.Error:  # it has ended by itself
            continue
