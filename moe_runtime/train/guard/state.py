"""What the guards remember from step to step, saved and rolled back with the weights it belongs to.

It lives in the checkpoint's manifest, not in metrics.jsonl: the losses that a spike is judged by belong to
the weights that made them, so they must come and go together. A records file may be moved, lose its last
lines to a full disk, or lie on one rank alone; a manifest is read and proved by all.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_runtime.data.skipped import SkippedData
from moe_runtime.metrics.alerts import Alerts, Rule
from moe_runtime.train.guard.spike import robust_z


class GuardState:
    """Recent losses, steps skipped, alerts, roll-backs done and data passed over; alike on every rank.

    Args:
        window: losses that are kept.
        skip: ranges of sequences that the config passes over.
        rules: of the run's alerts.
    """

    def __init__(self, window: int, skip: Iterable[Sequence[int]] = (), rules: tuple[Rule, ...] = ()) -> None:
        self._wanted = tuple(skip)
        self.alerts = Alerts(rules)
        self.losses: deque[float] = deque(maxlen=window)
        self.skips_in_row = 0
        self.skipped_steps = 0
        self.roll_backs = 0
        self.skipped_data = SkippedData(self._wanted)

    def spike_z(self, loss: float) -> float | None:
        """How far a loss stands out from those before; None until the window is full."""
        return robust_z(self.losses, loss) if len(self.losses) == self.losses.maxlen else None

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps of it, beside its skipped ranges."""
        return {
            "losses": list(self.losses),
            "skips_in_row": self.skips_in_row,
            "skipped_steps": self.skipped_steps,
            "roll_backs": self.roll_backs,
            "alerts": self.alerts.to_json(),
        }

    def restore(self, fields: Mapping[str, Any], skipped: Iterable[Sequence[int]], position: int) -> None:
        """Take what a checkpoint holds.

        Args:
            fields: what `to_json` gave; empty where a checkpoint holds none.
            skipped: its ranges of skipped data.
            position: sequences trained on; ranges of the config that begin before are too late.
        """
        self.losses = deque(fields.get("losses", ()), maxlen=self.losses.maxlen)
        self.skips_in_row = fields.get("skips_in_row", 0)
        self.skipped_steps = fields.get("skipped_steps", 0)
        self.roll_backs = fields.get("roll_backs", 0)
        self.alerts.restore(fields.get("alerts", {}))
        self.skipped_data = SkippedData(skipped).with_later(self._wanted, position)
