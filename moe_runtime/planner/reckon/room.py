"""Refuses at once what no layout can make fit, before anything is reckoned layer by layer."""

from moe_runtime.config.counts import count_parameters
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster

GIGA = 1e9
_ITEM = {"fp32": 4, "bf16": 2, "fp8": 2}


def check_room(config: RunConfig, cluster: Cluster, accelerators: int) -> None:
    """Every weight lies on one accelerator at least.

    Raises:
        ConfigError: all accelerators together have less memory than the weights alone take.
    """
    counts = count_parameters(config.model)
    needed = (counts.total + counts.mtp) * _ITEM.get(config.precision, 4)
    there = accelerators * cluster.accelerator.memory_gb * GIGA
    if needed > there:
        raise ConfigError(
            f"{config.name} does not fit on {cluster.name}: its weights alone take {needed / GIGA:,.1f} GB, "
            f"expected at most the {there / GIGA:,.1f} GB of {accelerators:,} x {cluster.accelerator.name}; "
            "take more accelerators or a smaller model"
        )
