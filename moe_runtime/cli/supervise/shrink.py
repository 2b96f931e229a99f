"""The layout of a run for which not all machines are there: fewer data-parallel replicas, the same batch.

A step of fewer replicas takes longer and computes the same: the global batch stays. pp and ep stay too, for
they say how the model is cut; dp may be any multiple of ep with which the batch still fills the pipeline.
"""

from dataclasses import dataclass

from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """What an attempt runs.

    Args:
        dp: data-parallel replicas.
        world_size: ranks; the rest of those that could be started stand by.
    """

    dp: int
    world_size: int


def fit_shape(config: RunConfig, available: int) -> Shape:
    """The largest layout for `available` ranks, not beyond the run's own.

    Raises:
        ConfigError: not even the smallest one fits.
    """
    layout = config.layout
    for dp in range(min(layout.dp, available // layout.pp), 0, -1):
        if dp == layout.dp or _fits(config, dp):
            return Shape(dp, dp * layout.pp)
    needed = layout.pp * layout.ep
    raise ConfigError(
        f"layout: pp {layout.pp} x ep {layout.ep} needs {needed} processes at least, got {available}; "
        "start more machines"
    )


def _fits(config: RunConfig, dp: int) -> bool:
    words = config.model_dump(mode="json")
    words["layout"]["dp"] = dp
    try:
        check_layout(RunConfig.model_validate(words))
    except ValueError:  # pydantic's, of a rule of the section itself
        return False
    except ConfigError:
        return False
    return True
