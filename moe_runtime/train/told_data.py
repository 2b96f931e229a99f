"""What a run says about its mixture at the start: the share of each set, and how often it will be read."""

from collections.abc import Mapping
from typing import Any

from moe_runtime.config.derive import sequences_before, total_steps
from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.loader import Loader
from moe_runtime.data.mixture_loader import MixtureLoader
from moe_runtime.data.skipped import SkippedData
from moe_runtime.metrics.recorder import Recorder


def mixture_facts(
    config: RunConfig, layout: ResolvedLayout, loader: Loader, skipped: SkippedData
) -> dict[str, Any] | None:
    """The fields of the event `data`; None for a run on one set.

    Returns:
        message, shares and epochs: of each set its share of the sequences, and how often it will have been
        read when training ends.
    """
    if not isinstance(loader, MixtureLoader):
        return None
    steps = total_steps(config, layout)
    epochs = loader.epochs(skipped.number(sequences_before(config, layout, steps)))
    parts = [
        f"{name} {100 * share:.3g} %, {epochs[name]:.2f} epochs" for name, share in loader.shares.items()
    ]
    message = f"data: {'; '.join(parts)} by step {steps}"
    return {"message": message, "shares": loader.shares, "epochs": epochs}


def tell_data(recorder: Recorder, mixed: Mapping[str, Any] | None) -> None:
    """What a run reads, if that is a mixture or masked.

    Args:
        mixed: from `mixture_facts`.
    """
    if mixed is not None:
        recorder.event("data", **mixed)
        recorder.say(mixed["message"])
