"""What a run measures of itself, how often, and where its records go besides metrics.jsonl."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from moe_runtime.config.section import Count, Section


class MetricsConfig(Section):
    """What is measured, how often, and where records go besides metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = Field(
        "offline", description="offline: into the run folder, for `wandb sync` later"
    )
    wandb_project: str = Field("moe_runtime", description="project of the run at W&B")
    trace_step: PositiveInt | None = Field(3, description="the step whose spans go to trace.json; null: none")
    window: Annotated[int, Field(ge=2, le=10_000)] = Field(
        100, description="steps that step_s_p50, step_s_p99 and violation_global look back on"
    )
    layers_every: Count = Field(
        1, description="steps between records with every layer's numbers; 0: their spread alone"
    )
    heatmap_every: Count = Field(
        10,
        description="steps between lines of expert_load.jsonl at first; it keeps at most 1,000; 0: no file",
    )
    numerics_every: Count = Field(
        10, description="steps between samples of updates and, under fp8, of casts; 0: none"
    )
    peak_tflops: PositiveFloat | None = Field(
        None, description="peak of one rank's device, 10^12 operations a second; null: known of GPUs alone"
    )

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as false.
        return "off" if value is False else value
