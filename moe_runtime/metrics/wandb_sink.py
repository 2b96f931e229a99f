"""W&B as one more reader of the records, which can fail in any way without training noticing.

Everything W&B does happens on one thread of its own, fed by a queue: importing it, opening the run,
logging, finishing. A service that hangs or dies, a full disk, a missing key, package or network
therefore cost a warning, never a step and never a wait. Failing with a time limit inside the training
thread was rejected: every step after a hang would pay the limit again.

Secrets stay out of its files: no command line, no environment, no source code is recorded.
"""

import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil

_QUEUE_ITEMS = 10_000
_INIT_TIMEOUT_S = 20.0
_ID_FILE = "run_id"


class WandbSink:
    """Copies records to a W&B run in `run_dir/wandb`.

    Args:
        run_dir: the run folder; the run's id is kept there, so that a resumed run goes on as the same.
        config: what W&B shows as the run's configuration.
        name, project: as W&B shows them.
        mode: `online` falls back to offline when there is no key or no network.
        finish_timeout_s: how long `close` waits; then W&B's service is killed, for its own exit hook
            would wait for it without limit.

    W&B has one session per process; closing the sink ends it.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        name: str,
        project: str,
        mode: Literal["offline", "online"],
        finish_timeout_s: float = 15.0,
    ) -> None:
        self._run_dir, self._config = run_dir, config
        self._name, self._project, self._mode = name, project, mode
        self._finish_timeout_s = finish_timeout_s
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE_ITEMS)
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, fields: dict[str, Any], step: int) -> None:
        """Queue one record; nested fields become `layers/layers.3/violation`."""
        flat = flatten(fields)
        self._put(lambda run: run.log(flat, step=step))

    def sample(self, step: int, text: str) -> None:
        """Queue a generated text."""

        def log_table(run: Any) -> None:
            import wandb

            run.log({"sample": wandb.Table(columns=["step", "text"], data=[[step, text]])}, step=step)

        self._put(log_table)

    def alert(self, title: str, text: str) -> None:
        """Queue an alert, which W&B sends on as the user has set there."""
        self._put(lambda run: run.alert(title, text))

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

    def _put(self, item: Callable[[Any], None] | None) -> None:
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
            self._warnings.put(f"W&B is off from here: {line}; metrics.jsonl has everything")

    def _work(self) -> None:
        try:
            run = self._open()
            while not self._failed.is_set() and (item := self._queue.get()) is not None:
                item(run)
            run.finish()
        except BaseException as error:  # a thread has nobody to raise to; W&B may even raise SystemExit
            self._give_up(f"{type(error).__name__}: {error}")
        try:
            _end_session()
        except BaseException as error:  # a dead service cannot be told to end; its hook is gone by now
            self._give_up(f"{type(error).__name__}: {error}")

    def _open(self) -> Any:
        if self._mode == "offline":
            return self._init("offline")
        try:
            if not _has_key():
                raise PermissionError("no API key: set WANDB_API_KEY or run `wandb login`")
            return self._init("online")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self._warnings.put(f"W&B records offline: {reason}; `wandb sync` sends it later")
            _end_session()  # the service keeps the id of a run that it could not open
            return self._init("offline")

    def _init(self, mode: Literal["offline", "online"]) -> Any:
        (self._run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        run_id = _kept_id(self._run_dir / "wandb" / _ID_FILE)
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            init_timeout=_INIT_TIMEOUT_S,
            login_timeout=1.0,
        )
        return wandb.init(
            dir=str(self._run_dir),
            config=self._config,
            name=self._name,
            project=self._project,
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            settings=settings,
        )


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries become `layers/layers.3/violation`; None is left out."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _kept_id(path: Path) -> str:
    """The run's id: made once, then read."""
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    made = secrets.token_hex(4)
    path.write_text(made + "\n")
    return made


def _end_session() -> None:
    """Let W&B's service end now, rather than in a hook at exit that prints and may wait."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


def _kill_service() -> None:
    """Kill the service that W&B started under this process."""
    for child in psutil.Process().children(recursive=True):
        try:
            if "wandb-core" in " ".join(child.cmdline()):
                child.kill()
        except psutil.Error:  # it has ended by itself
            continue


def _has_key() -> bool:
    """Whether W&B can sign in without asking, which it would do in the middle of the progress bar."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or netrc.exists()
