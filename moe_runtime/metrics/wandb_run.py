"""One open run of W&B: what a record, a sample, an alert and a picture become there.

Everything here talks to W&B's service and may raise whatever that raises, or wait for it: training goes
through `wandb_sink`, on a thread of its own, and `rebuild` calls this directly.

Secrets stay out of W&B's files: no command line, no environment, no source code is recorded. What is known of
the machine is what `system` lists.

A table is logged by increments: each sample is sent once, and W&B joins them. Logging the whole table anew
with each sample was rejected, for its size then grows with the square of their number.
"""

import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import ArrayLike

from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, TIMELINE, flat_values
from moe_runtime.metrics.system import system_facts
from moe_runtime.metrics.table_events import SAMPLE

Mode = Literal["offline", "online"]
FOLDER = "wandb"
_INIT_TIMEOUT_S = 20.0
_ID_FILE = "run_id"
_SAMPLE_COLUMNS = ("step", "text")
_ALERT_COLUMNS = ("step", "alert", "metric", "value", "threshold", "action", "message")


@dataclass(frozen=True)
class RunPlace:
    """Which run of W&B is meant.

    Args:
        run_dir: the run folder; W&B's files go to `run_dir/wandb`.
        config: what W&B shows as the run's configuration.
        name, project: as W&B shows them.
        run_id: W&B's; files with the same one are parts of one run.
    """

    run_dir: Path
    config: Mapping[str, Any]
    name: str
    project: str
    run_id: str


class WandbRun:
    """An open run.

    Args:
        run: of the package.
        earlier: events of samples and alerts that an earlier part of the run has logged: of a table W&B shows
            the newest part's alone, so these become rows with the first one that is new.
    """

    def __init__(self, run: Any, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        import wandb

        self._wandb, self._run = wandb, run
        self._samples = wandb.Table(columns=list(_SAMPLE_COLUMNS), log_mode="INCREMENTAL")
        self._alerts = wandb.Table(columns=list(_ALERT_COLUMNS), log_mode="INCREMENTAL")
        self._newest = 0
        for event in earlier:
            self._add(event)

    @property
    def folder(self) -> Path:
        """Where W&B keeps this part of the run."""
        return Path(self._run.dir).parent

    @property
    def url(self) -> str:
        """Where it is to be seen; of an online run."""
        return str(self._run.url)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """A line of metrics.jsonl, under flat keys.

        After a roll-back W&B leaves out the steps that it has passed.
        """
        self._newest = max(self._newest, step)
        self._run.log(flat_values(record), step=step)

    def sample(self, step: int, text: str) -> None:
        """One more row of the table of samples."""
        self._add({"kind": SAMPLE, "step": step, "text": text})
        self._attach({SAMPLES: self._samples}, step)

    def alert(self, event: Mapping[str, Any]) -> None:
        """One more row of the table of alerts, and a word to the people that W&B tells of such.

        Args:
            event: of kind `alert` in events.jsonl; its `action` lists what was done.
        """
        step = event["step"]
        self._add(event)
        self._attach({ALERTS: self._alerts}, step)
        if "wandb" in event.get("action", ()):
            title, text = f"{event['alert']} at step {step}", str(event.get("message", ""))
            self._run.alert(title=title, text=text, level="WARN")

    def _attach(self, media: dict[str, Any], step: int) -> None:
        """Log media at their step, or at the newest one if W&B has passed theirs."""
        self._newest = max(self._newest, step)
        self._run.log(media, step=self._newest)

    def _add(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == SAMPLE:
            self._samples.add_data(*(event[key] for key in _SAMPLE_COLUMNS))
        else:  # values of different alerts are numbers or words: a column has one type
            self._alerts.add_data(event["step"], *(str(event.get(key, "")) for key in _ALERT_COLUMNS[1:]))

    def heatmap(self, step: int, layers: Sequence[str], load: ArrayLike) -> None:
        """The load of every expert at a step, as a picture.

        Args:
            load: [layers, experts], relative to a fair share.
        """
        # Imported here, as W&B itself does: it draws with a library that a run without W&B does not need.
        from moe_runtime.metrics.heatmap_picture import draw_heatmap

        picture = self._wandb.Image(draw_heatmap(layers, load), caption=f"step {step}")
        self._attach({HEATMAP: picture}, step)

    def timeline(self, step: int, svg: str) -> None:
        """The measured pipeline timeline of a step, as a drawing."""
        self._attach({TIMELINE: self._wandb.Html(svg, inject=False)}, step)

    def finish(self) -> None:
        """End the run; waits until W&B has everything."""
        self._run.finish()


def open_run(place: RunPlace, mode: Mode, earlier: Iterable[Mapping[str, Any]] = ()) -> WandbRun:
    """Open a run; W&B has one session per process, see `end_session`.

    Args:
        earlier: see `WandbRun`; online W&B has them itself.

    Raises:
        PermissionError: online, and there is no key.
        Exception: whatever W&B raises; ImportError if it is missing.
    """
    if mode == "online" and not has_key():
        raise PermissionError("no API key: set WANDB_API_KEY or run `wandb login`")
    (place.run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
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
    run = wandb.init(
        dir=str(place.run_dir),
        config={**place.config, "system": system_facts()},
        name=place.name,
        project=place.project,
        id=place.run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        settings=settings,
    )
    return WandbRun(run, earlier if mode == "offline" else ())


def kept_id(run_dir: Path) -> str:
    """The id under which a run folder's run goes: made once, then read.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / FOLDER / _ID_FILE
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    made = new_id()
    keep_id(run_dir, made)
    return made


def keep_id(run_dir: Path, run_id: str) -> None:
    """Let a run folder's run go under this id from now on.

    Raises:
        OSError: it cannot be written.
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ID_FILE).write_text(run_id + "\n")


def new_id() -> str:
    """An id that no other run has."""
    return secrets.token_hex(4)


def end_session() -> None:
    """Let W&B's service end now, rather than in a hook at exit that prints and may wait."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


def has_key() -> bool:
    """Whether W&B can sign in without asking, which it would do in the middle of the progress bar."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or netrc.exists()
