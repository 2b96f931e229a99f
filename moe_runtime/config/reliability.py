"""What a run does against faults: limits of time, restarts, and guards over its numbers."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Count, Section


class TimeLimits(Section):
    """Seconds that a rank may pass without a mark of progress, by phase of the loop.

    Within a program every part of a block is a mark, so `step` is about one part, not a whole step;
    `train.watchdog_s` is that limit.
    """

    start: PositiveFloat = Field(900.0, description="from the start of a process to its first step")
    first_step: PositiveFloat = Field(900.0, description="a part of a process's first step: kernels compile")
    data: PositiveFloat = Field(120.0, description="reading the tokens of a step")
    optimizer: PositiveFloat = Field(120.0, description="reducing gradients and updating weights")
    evaluate: PositiveFloat = Field(120.0, description="a part of a validation or a sample")
    save: PositiveFloat = Field(900.0, description="taking a checkpoint, or waiting for the one before")
    end: PositiveFloat = Field(900.0, description="what follows the last step")


class ReliabilityConfig(Section):
    """How the launcher watches ranks and brings them back."""

    heartbeat_s: Annotated[float, Field(gt=0.0, le=60.0)] = Field(
        1.0, description="seconds between heartbeats of a rank"
    )
    limits: TimeLimits = TimeLimits()
    restarts: Count = Field(3, description="restarts in a row that reach no new checkpoint; 0: none at all")
    back_off_s: PositiveFloat = Field(1.0, description="before the second restart in a row; doubles up to 60")
    rejoin_s: PositiveFloat = Field(
        30.0, description="wait for machines that left, or never came, before going on with fewer"
    )
    private: bool = Field(True, description="a new run folder can be entered by its owner alone")
    straggler_ratio: Annotated[float, Field(gt=1.0)] | None = Field(
        1.5, description="a rank whose own work takes so many times the median's is told; null: none"
    )


class GuardConfig(Section):
    """What is held against numbers that go wrong."""

    max_skips: PositiveInt = Field(5, description="skipped steps in a row that end the run")
    spike_z: PositiveFloat | None = Field(
        None, description="robust z-score of a loss above which it is a spike; null: not looked for"
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(128, description="steps that a loss is compared with")
    spike_action: Literal["log", "roll_back"] = Field(
        "log", description="roll_back: to the newest checkpoint, and on with later data"
    )
    spike_skip_steps: Count = Field(2, description="steps of data after the spike that are skipped too")
    spike_max: PositiveInt = Field(3, description="roll-backs that one run may do")
    digest_every: Count = Field(
        50, description="steps between comparisons of replicas; 0: none, and no look at state at rest either"
    )
    digest_action: Literal["stop", "heal"] = Field(
        "heal",
        description="bits that changed unbidden: end the run, or write weights again from their masters and "
        "take optimizer state from the newest checkpoint; a rank that was healed before ends it either way",
    )
    replay_every: Count = Field(0, description="steps between steps that are run twice; 0: none")

    def findings(self) -> list[Finding]:
        """A roll-back needs something that calls for it."""
        if self.spike_action == "roll_back" and self.spike_z is None:
            return [Finding("spike_action", "roll_back has no effect while spike_z is null: set both")]
        return []
