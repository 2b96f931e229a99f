"""AdamW over flat FP32 partitions, how its moments are stored, schedules and parameter groups.

`from moe_runtime.optim import AdamW` is all that other people's models need: docs/optimizer.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_runtime.optim.adamw import AdamW

__all__ = ["AdamW"]


def __getattr__(name: str) -> Any:
    # Found when asked for: who wants a schedule alone need not wait for torch.
    if name == "AdamW":
        from moe_runtime.optim.adamw import AdamW

        return AdamW
    raise AttributeError(f"module {__name__} has no attribute {name}")
