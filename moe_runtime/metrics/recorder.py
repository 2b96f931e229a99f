"""Ties the sinks together: one call per step, event or sample; silent on every rank but the first."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_runtime.config.counts import moe_layers
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.secrets import redact
from moe_runtime.metrics.console import ConsoleSink, open_console
from moe_runtime.metrics.files import EVENTS_FILE, METRICS_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE, HeatmapWriter
from moe_runtime.metrics.jsonl import JsonLines, last_of, read_jsonl
from moe_runtime.metrics.ledger import Ledger
from moe_runtime.metrics.line import finite_or_none, to_line
from moe_runtime.metrics.report.shown import unhidden
from moe_runtime.metrics.table_events import SAMPLE, read_table_events
from moe_runtime.metrics.wandb_sink import WandbSink
from moe_runtime.parallel.peers import Peers
from moe_runtime.planner.draw import draw_svg
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.trace import Trace

# `Recorder.tell`, for those that find something and need to know no more of records.
Tell = Callable[..., None]


class Recorder:
    """Where a run reports to; only rank 0 writes anything.

    No method raises for want of disk space, network or W&B: it warns once and goes on.

    Args:
        run_dir: the run folder.
        config: the run's configuration; its `train` and `metrics` sections steer the sinks.
        peers: all ranks of the run.
        resume_step: steps done when the run starts; later lines of an earlier attempt are removed from
            metrics.jsonl. 0 starts it empty. events.jsonl keeps everything.
        console: shows the run on rank 0; None: a new one on standard output.
        attempt: number of the launcher's attempt; stands in events, and from the second on in every line.
        lived_s: how long this process has lived.

    Raises:
        OSError: metrics.jsonl or events.jsonl cannot be opened (rank 0 only).
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: RunConfig,
        peers: Peers,
        resume_step: int = 0,
        console: ConsoleSink | None = None,
        attempt: int = 1,
        lived_s: float = 0.0,
    ) -> None:
        self._attempt = attempt
        self._warned: set[str] = set()
        self._is_active = peers.is_first
        self._wandb: WandbSink | None = None
        if not self._is_active:
            return
        run_dir = Path(run_dir)
        metrics = config.metrics
        self._console = console or open_console(config, attempt)
        path, last = run_dir / METRICS_FILE, last_of(run_dir / METRICS_FILE)
        self._metrics = JsonLines(path, keep_to_step=resume_step)
        self._events = JsonLines(run_dir / EVENTS_FILE)
        past = read_jsonl(run_dir / EVENTS_FILE)
        self._ledger = Ledger(past, last, last_of(path), resume_step, attempt, lived_s)
        self._heatmap = _open_heatmap(run_dir, config, resume_step)
        self._moe_layers = moe_layers(config.model)
        if metrics.wandb != "off":
            shown = config.model_dump(mode="json")
            earlier = read_table_events(run_dir / EVENTS_FILE, resume_step)
            where = (config.name, metrics.wandb_project, metrics.wandb)
            self._wandb = WandbSink(run_dir, shown, *where, earlier)

    def step(self, record: Mapping[str, Any]) -> None:
        """Report one optimizer step, with what the run went through so far.

        Args:
            record: some of `record.METRICS`; `step`, `tokens` and `loss` among them.
        """
        if not self._is_active:
            return
        repair_s = self._ledger.repaired_after()
        if repair_s is not None:
            self.event("recovered", step=record["step"], seconds=repair_s)
        fields = to_line({**record, **self._ledger.step(record)})
        self._note(self._metrics.append(fields))
        self._console.step(record)
        if self._wandb is not None:
            self._wandb.log(fields, record["step"])
            self._note_wandb(self._wandb)

    def expert_load(self, step: int, load: Tensor | None) -> None:
        """Report the load of every expert in a step; None: it is not due.

        Args:
            load: FP64 [MoE layers, experts], relative to a fair share.
        """
        if not self._is_active or self._heatmap is None or load is None:
            return
        self._note(self._heatmap.add(step, load.numpy()))
        if self._wandb is not None:
            self._wandb.heatmap(step, self._moe_layers, load.numpy())

    def roll_back(self, step: int) -> None:
        """Take the records of later steps out of metrics.jsonl and expert_load.jsonl, as a resume would.

        W&B keeps them: what comes after has steps that it has seen, and it leaves those out until a new one.
        """
        if not self._is_active:
            return
        try:
            self._metrics.keep_to(step)
            self._ledger.roll_back(last_of(self._metrics.path))
            if self._heatmap is not None:
                self._heatmap.roll_back(step)
        except OSError as error:
            self._note(f"{METRICS_FILE}: later steps stay in it: {error.strerror}")

    def say(self, text: str) -> None:
        """Print a line on the console, above the progress bar."""
        if self._is_active:
            self._console.say(redact(text))

    def begins(self, step: int, said: Sequence[str] = ()) -> None:
        """Add the event that an attempt of this run begins after `step` steps, and how it took up."""
        if self._is_active:
            self.event("attempt", step=step, lost_steps=self._ledger.lost_steps_now, run_s=self._ledger.run_s)
        for line in said:
            self.event("resume", message=line)
            self.say(line)

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl: resume, checkpoint, skipped, stopped ...

        Args:
            kind: one word.
            **fields: JSON values.
        """
        if not self._is_active:
            return
        values = {key: _safe(value) for key, value in fields.items()}
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "kind": kind, "attempt": self._attempt, **values}
        failure = self._events.append(line)
        self._ledger.add(line)
        if kind != "warning":
            self._note(failure)

    def tell(self, kind: str, step: int, message: str, **fields: Any) -> None:
        """Add an event of a step, and print its message."""
        self.event(kind, step=step, message=message, **fields)
        self.say(f"step {step}: {message}")

    def alert(self, step: int, message: str, actions: Sequence[str], fields: Mapping[str, Any]) -> None:
        """Tell an alert, to W&B too if an action says so.

        Args:
            fields: of the event beside step and message; JSON values.
        """
        if not self._is_active:
            return
        self.tell("alert", step, message, **fields)
        if self._wandb is not None:
            shown = {"message": message, **fields}
            said = {key: _safe(value) for key, value in shown.items()}
            self._wandb.alert({"kind": "alert", "step": step} | said)
        elif "wandb" in actions:
            self._note("an alert's action is wandb, and metrics.wandb is off: it is in events.jsonl alone")

    def sample(self, step: int, text: str) -> None:
        """Report a generated text."""
        if not self._is_active:
            return
        self.event(SAMPLE, step=step, text=text)
        self.say(f"--- sample at step {step}\n{unhidden(text)}\n---")
        if self._wandb is not None:
            self._wandb.sample(step, text)

    def timeline(self, trace: Trace) -> None:
        """Give W&B a drawing of the trace of a step."""
        if self._wandb is not None:
            self._wandb.timeline(trace.step, lambda: draw_svg(timeline_of(trace)))

    def close(self) -> None:
        """Finish all sinks; gives W&B a few seconds."""
        if not self._is_active:
            return
        if self._wandb is not None:
            self._console.phase("closing the W&B run")
            self._wandb.close()
            self._note_wandb(self._wandb)
        self._console.close()
        self._metrics.close()
        if self._heatmap is not None:
            self._heatmap.close()
        self._events.close()
        self._is_active = False

    def _note_wandb(self, sink: WandbSink) -> None:
        while (warning := sink.take_warning()) is not None:
            self._note(warning)

    def _note(self, warning: str | None) -> None:
        """Say a warning once."""
        if warning is not None and warning not in self._warned:
            self._warned.add(warning)
            self.event("warning", message=warning)
            self.say(f"warning: {warning}")


def _open_heatmap(run_dir: Path, config: RunConfig, resume_step: int) -> HeatmapWriter | None:
    """None where there is nothing to show."""
    layers, every = moe_layers(config.model), config.metrics.heatmap_every
    if not layers or not every:
        return None
    return HeatmapWriter(run_dir / HEATMAP_FILE, layers, every, keep_to_step=resume_step)


def _safe(value: Any) -> Any:
    """As JSON can hold it and a run folder may."""
    return redact(value) if isinstance(value, str) else finite_or_none(value)
