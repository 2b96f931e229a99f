"""Judges every step by its record: skipped steps in a row, and losses that stand out."""

import math
from collections.abc import Mapping
from typing import Any

from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import DataError, NumericsError
from moe_runtime.metrics.recorder import Tell
from moe_runtime.train.guard.skips import Blame, check_data, check_row, describe
from moe_runtime.train.guard.state import GuardState


class Guard:
    """Decides from records and from its own state alone, so all ranks decide alike without asking.

    Args:
        config: of the run; its guard section, and what it leaves out or bears.
        state: what is remembered over steps.
        tell: called with the kind of an event, its step, its message and fields.
    """

    def __init__(self, config: RunConfig, state: GuardState, tell: Tell) -> None:
        self.config, self.state, self._tell = config.guard, state, tell
        self._left_out, self._bad_data = frozenset(config.train.skip_updates), config.data.bad

    def finds_spike(self, record: Mapping[str, Any], blames: list[Blame]) -> bool:
        """Take a step into account; True if its loss is a spike and the run is to roll back.

        Raises:
            NumericsError: too many steps in a row were skipped; on every rank alike.
            DataError: a rank read what the model cannot take, and the config says stop; likewise.
        """
        if record["skipped"]:
            self._judge_skip(record, blames)
            return False  # the loss of a step that left nothing behind says nothing of the next
        self.state.skips_in_row = 0
        return self._judge_loss(record["step"], record["loss"])

    def _judge_skip(self, record: Mapping[str, Any], blames: list[Blame]) -> None:
        step, norm = record["step"], record["grad_norm"]
        if step in self._left_out:
            self._tell("skipped", step, "update left out, as train.skip_updates says", grad_norm=norm)
            return
        self.state.skips_in_row += 1
        what, row = describe(blames), self.state.skips_in_row
        message = f"gradient norm {norm}, step skipped ({row} in a row): {what}"
        self._tell("skipped", step, message, grad_norm=norm, in_row=row, culprits=blames)
        try:
            check_data(blames, self._bad_data)
            check_row(row, self.config.max_skips, what)
        except (NumericsError, DataError) as error:
            self._tell("stopped", step, str(error))
            raise

    def _judge_loss(self, step: int, loss: float) -> bool:
        limit, z = self.config.spike_z, self.state.spike_z(loss)
        if math.isfinite(loss):
            self.state.losses.append(loss)
        if limit is None or z is None or not z > limit:
            return False
        rolls_back = self.config.spike_action == "roll_back" and self.state.roll_backs < self.config.spike_max
        self._tell("spike", step, f"loss {loss:.4f} is a spike: z {z:.1f}", loss=loss, z=z)
        return rolls_back
