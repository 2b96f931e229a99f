"""When a run calls for a person, and what it does by itself then.

A rule watches one number of the record. It raises an alert when the number lay beyond `threshold` at
`patience` measurements running, and does not raise it again before the number was back for as long. The
defaults are meant to be silent in a sound run of any size: `docs/metrics.md` has what each number is.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator

from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Section

Action = Literal["log", "wandb", "checkpoint", "stop", "roll_back"]
Actions = Annotated[
    tuple[Action, ...],
    Field(
        description="one or several; every alert is logged. wandb: an alert there too; checkpoint: save now; "
        "stop: end the run, exit code 5; roll_back: to the newest checkpoint, and on with later data",
    ),
]


class _Acting(Section):
    """What is done, and after how many measurements."""

    patience: PositiveInt = Field(1, description="measurements in a row, beyond the threshold")
    action: Actions = ("log",)

    @field_validator("action", mode="before")
    @classmethod
    def _one_needs_no_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def findings(self) -> list[Finding]:
        """What ends a step in two ways cannot be done."""
        found = []
        if not self.action:
            found.append(Finding.expected("action", f"at least one of {', '.join(get_args(Action))}", "none"))
        for one, other in (("roll_back", "stop"), ("roll_back", "checkpoint")):
            if one in self.action and other in self.action:
                found.append(Finding("action", f"{one} and {other} exclude each other; leave out one"))
        return found


class AlertRule(_Acting):
    """One of the alerts that every run has."""

    threshold: float | None = Field(None, description="an alert above it; null: this alert is off")

    def findings(self) -> list[Finding]:
        """An alert that is off does nothing."""
        found = super().findings()
        if self.threshold is None and self.action != ("log",):
            found.append(Finding("action", "has no effect while threshold is null: set both"))
        return found


class DeadExpert(AlertRule):
    """Experts without tokens that the routing bias does not bring back."""

    threshold: float | None = Field(100.0, description="of routing/starved_steps/max, steps; null: off")


class Violation(AlertRule):
    """A layer that is overloaded and not being evened out."""

    threshold: float | None = Field(
        1.0, description="of routing/unchecked_violation/max, or 0.9 of E / top_k - 1 if less; null: off"
    )
    patience: PositiveInt = Field(10, description="steps in a row, from the first full metrics.window on")


class BiasRunaway(AlertRule):
    """Routing biases further apart than any affinities can be."""

    threshold: float | None = Field(1.5, description="of routing/bias_range/max; null: off")
    patience: PositiveInt = Field(10, description="steps in a row")


class Spike(AlertRule):
    """A loss that stands out from those before it."""

    threshold: float | None = Field(12.0, description="of spike_z; null: off")


class Saturation(AlertRule):
    """FP8 operands whose largest values are cut off."""

    threshold: float | None = Field(0.02, description="of fp8/*/saturation; null: off")
    patience: PositiveInt = Field(2, description="samples in a row, metrics.numerics_every steps apart")


class Underflow(AlertRule):
    """FP8 operands whose small values are lost."""

    threshold: float | None = Field(0.2, description="of fp8/*/underflow; null: off")
    patience: PositiveInt = Field(3, description="samples in a row")


class Fp8Error(AlertRule):
    """FP8 products that are far from those of the same operands in high precision."""

    threshold: float | None = Field(0.15, description="of fp8_error; null: off")
    patience: PositiveInt = Field(2, description="samples in a row")


class Straggler(AlertRule):
    """A rank that makes all others wait."""

    threshold: float | None = Field(1.5, description="of straggler_ratio; null: off")
    patience: PositiveInt = Field(10, description="steps in a row")


class Nonfinite(AlertRule):
    """Gradients that are not finite; the step is skipped by itself, see guard.max_skips."""

    threshold: float | None = Field(0.0, description="of nonfinite, parameters; null: off")


class CustomAlert(_Acting):
    """An alert on any number of the record."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$", description="as it is told")]
    metric: str = Field(
        description="its path, such as grad_norm or routing/logit_rms/max; * for any name: the worst of them"
    )
    above: float | None = Field(None, description="an alert above it")
    below: float | None = Field(None, description="an alert below it")

    def findings(self) -> list[Finding]:
        """One side has a threshold."""
        found = super().findings()
        if (self.above is None) == (self.below is None):
            found.append(Finding("above", "expected either above or below, got both or neither"))
        return found


class AlertsConfig(Section):
    """What the run tells by itself, and what it does then."""

    dead_expert: DeadExpert = DeadExpert()
    violation: Violation = Violation()
    bias_runaway: BiasRunaway = BiasRunaway()
    spike: Spike = Spike()
    saturation: Saturation = Saturation()
    underflow: Underflow = Underflow()
    fp8_error: Fp8Error = Fp8Error()
    straggler: Straggler = Straggler()
    nonfinite: Nonfinite = Nonfinite()
    custom: tuple[CustomAlert, ...] = Field((), description="alerts of your own, on any number of a record")

    def findings(self) -> list[Finding]:
        """Names tell alerts apart."""
        names = [*BUILT_IN, *(alert.name for alert in self.custom)]
        twice = next((name for name in names if names.count(name) > 1), None)
        text = f"two alerts are named {twice}; rename one"
        return [] if twice is None else [Finding("custom", text)]


BUILT_IN = tuple(name for name in AlertsConfig.model_fields if name != "custom")
