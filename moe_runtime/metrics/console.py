"""What the person in front of the terminal sees: a bar on a terminal, plain lines in a pipe.

On a terminal one line at the bottom always says what is being done: a phase (`loading libraries`,
`validating`) or the newest step, with the time left. In a pipe every `log_every`-th step has a line, and so
has a phase that takes long.
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from moe_runtime.config.schema import RunConfig
from moe_runtime.metrics.phase_lines import PhaseLines
from moe_runtime.parallel.progress import Progress as RankProgress

_SMOOTHING = 0.1  # weight of the newest step in the speed that the time left is computed from
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("val_loss", "val {:.4f}"),
    ("val_bpb", "{:.3f} bits/byte"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("grad_norm", "gradient {:.2f}"),
    ("max_violation", "load violation {:.2f}"),
)
_PATIENCE_S, _STARTING_PATIENCE_S = 5.0, 30.0  # of a phase in a pipe, until it has a line
_DETAIL_S = 0.1  # between changes of what a terminal shows of a phase
_NARROW = 100  # columns of a terminal below which the bar is short
# Phases of the loop that are worth telling; the others are over at once.
_PHASES = {
    "evaluate": "validating",
    "sample": "writing a sample",
    "save": "saving a checkpoint",
    "end": "finishing",
}
_FIRST_STEP = "first step: kernels are compiled and buffers made"


class ConsoleSink:
    """Progress of a run, for rank 0.

    Args:
        total_steps, total_tokens: where the run ends; whichever comes first. None: no such end.
        log_every: steps between plain lines; evaluation steps and the last one always have a line.
        console: where to write; standard output if None.
        attempt: number of the launcher's attempt; from the second on it stands in every line.
    """

    def __init__(
        self,
        total_steps: int | None,
        total_tokens: int | None,
        log_every: int,
        console: Console | None = None,
        attempt: int = 1,
    ) -> None:
        self._head = [f"attempt {attempt}"] if attempt > 1 else []
        self._total_steps, self._total_tokens, self._log_every = total_steps, total_tokens, log_every
        self._console = console or Console(soft_wrap=True)
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._first: tuple[float, float] | None = None  # (time, fraction done) when progress began
        self._rate: float | None = None  # fraction a second
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._line, self._phase, self._detail = "", "", ""
        self._phase_since = self._detail_since = 0.0
        self._phase_lines = PhaseLines(self.say)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step; `record` has some of `record.METRICS`, step, tokens and loss among them."""
        done = self._fraction(record)
        left_s = self._time_left(done)
        is_evaluation = record.get("val_loss") is not None
        if self._is_live:
            self._line = self._text(record, left_s, is_left_first=True)
            self._move_bar(done)
        if is_evaluation or (not self._is_live and (record["step"] % self._log_every == 0 or done >= 1.0)):
            self.say(self._text(record, left_s))

    def phase(self, text: str, patience_s: float = _PATIENCE_S) -> None:
        """Something else than a step begins, such as `validating`; empty: it has ended.

        Args:
            patience_s: seconds that it may take until it has a line in a pipe.
        """
        if text == self._phase:
            return
        self._phase, self._detail, self._phase_since = text, "", time.monotonic()
        if self._is_live:
            self._move_bar()
        else:
            self._phase_lines.enters(text, patience_s)

    def starting(self, text: str) -> None:
        """A phase before the first step; empty: all is ready."""
        self.phase(text, _STARTING_PATIENCE_S)

    def preparing(self, what: str, done: int, total: int | None) -> None:
        """Show how far the preparation of data is; for `data.prepare`, which calls it for every document.

        Args:
            what: a step of the preparation, such as `tokenising`.
            done, total: bytes of text; None: the total is not known yet.
        """
        self.phase(f"preparing data, {what}")
        now = time.monotonic()
        if now - self._detail_since < _DETAIL_S:
            return
        self._detail_since = now
        self._detail = _how_far(done, total, now - self._phase_since)
        if self._is_live:
            self._move_bar()
        else:
            self._phase_lines.detail(self._detail)

    def follow(self, progress: RankProgress) -> None:
        """Show the phases of the loop as they come; a listener of rank 0's marks."""
        if progress.phase == "start":
            return
        if progress.phase == "step" and progress.is_first_step:
            self.phase(_FIRST_STEP)
        else:
            self.phase(_PHASES.get(progress.phase, ""))

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; no markup, never wrapped."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away, leaving its last state."""
        self._phase_lines.close()
        if self._bar is not None:
            self._phase = self._detail = ""
            self._move_bar()
            self._bar.stop()

    def _fraction(self, record: Mapping[str, Any]) -> float:
        steps = record["step"] / self._total_steps if self._total_steps else 0.0
        tokens = record["tokens"] / self._total_tokens if self._total_tokens else 0.0
        return min(1.0, max(steps, tokens))

    def _time_left(self, done: float) -> float | None:
        """Seconds, from a smoothed speed; None until two steps have been seen."""
        now = time.monotonic()
        last, self._first = self._first, (now, done)
        if last is None or done <= last[1] or now <= last[0]:
            return None
        rate = (done - last[1]) / (now - last[0])
        self._rate = rate if self._rate is None else self._rate + _SMOOTHING * (rate - self._rate)
        return (1.0 - done) / self._rate

    def _text(self, record: Mapping[str, Any], left_s: float | None, is_left_first: bool = False) -> str:
        """A step in a line; the time left early in it where a narrow terminal may cut the end off."""
        end = f"/{self._total_steps}" if self._total_steps else ""
        left = [] if left_s is None else [f"{clock(left_s)} left"]
        parts = [form.format(record[key]) for key, form in _SHOWN if record.get(key) is not None]
        parts = [*left, *parts] if is_left_first else [*parts, *left]
        return " | ".join([*self._head, f"step {record['step']}{end}", *parts])

    def _move_bar(self, done: float | None = None) -> None:
        if self._bar is None or self._task is None:
            width = 24 if self._console.width >= _NARROW else 8
            # What is too long for the terminal is cut off the text, never the bar.
            bar = BarColumn(bar_width=width, table_column=Column(min_width=width))
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            text = TextColumn("{task.description}", markup=False, table_column=rest)
            self._bar = Progress(SpinnerColumn(), bar, text, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        phase = f"{self._phase}: {self._detail}" if self._detail else self._phase
        shown = " | ".join(filter(None, (phase, self._line)))
        if done is None:  # a phase, which may keep this thread for long: shown at once
            self._bar.update(self._task, description=shown, refresh=True)
        else:  # a step, of which there may be hundreds a second: shown by rich's own clock
            self._bar.update(self._task, description=shown, completed=done, total=1.0)


def open_console(config: RunConfig, attempt: int = 1, quiet: bool = False) -> ConsoleSink:
    """The console of a run, on standard output; quiet: of a rank that shows nothing."""
    train, console = config.train, Console(soft_wrap=True, quiet=quiet)
    return ConsoleSink(train.total_steps, train.total_tokens, train.log_every, console, attempt)


def _how_far(done: int, total: int | None, seconds: float) -> str:
    """`3.1 of 12.0 MB, 4.2 MB/s, 0:02 left`."""
    amount = f"{done / 1e6:.1f} MB" if total is None else f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
    if seconds <= 0 or done == 0:
        return amount
    speed = done / seconds
    left = "" if total is None else f", {clock(max(0, total - done) / speed)} left"
    return f"{amount}, {speed / 1e6:.1f} MB/s{left}"


def clock(seconds: float) -> str:
    """75 -> `1:15`, 3675 -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
