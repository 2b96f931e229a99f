"""What the person in front of the terminal sees: a bar on a terminal, plain lines in a pipe."""

import time
import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_SMOOTHING = 0.1  # weight of the newest step in the speed that the time left is computed from
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("val_loss", "val {:.4f}"),
    ("val_bpb", "{:.3f} bits/byte"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("max_violation", "load violation {:.2f}"),
)


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
        self._first: tuple[float, float] | None = None  # (time, fraction done) when progress began
        self._rate: float | None = None  # fraction a second
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step; `record` has some of `record.METRICS`, step, tokens and loss among them."""
        done = self._fraction(record)
        line = self._line(record, self._time_left(done))
        is_evaluation = record.get("val_loss") is not None
        if self._console.is_terminal:
            self._move_bar(done, line)
            if is_evaluation:
                self.say(line)
        elif record["step"] % self._log_every == 0 or done >= 1.0 or is_evaluation:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; no markup, never wrapped."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away, leaving its last state."""
        if self._bar is not None:
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

    def _line(self, record: Mapping[str, Any], left_s: float | None) -> str:
        end = f"/{self._total_steps}" if self._total_steps else ""
        parts = [*self._head, f"step {record['step']}{end}"]
        parts += [form.format(record[key]) for key, form in _SHOWN if record.get(key) is not None]
        if left_s is not None:
            parts.append(f"{clock(left_s)} left")
        return " | ".join(parts)

    def _move_bar(self, done: float, line: str) -> None:
        if self._bar is None or self._task is None:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._task, completed=done, description=line)


def printable(text: str) -> str:
    """Text of a model, made safe for a terminal: control characters but tab and newline as escapes."""
    return "".join(char if char in "\t\n" or not _is_control(char) else ascii(char)[1:-1] for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc"


def clock(seconds: float) -> str:
    """75 -> `1:15`, 3675 -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
