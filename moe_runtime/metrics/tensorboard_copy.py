"""A run of TensorBoard, made of a run folder: numbers in double precision, samples, alerts, heatmaps.

TensorBoard keeps numbers in single precision unless it is asked otherwise; here it is, so they are those of
metrics.jsonl. It groups numbers by the first part of their names, so a name begins with the section of
its panel. It draws no SVG: the pipeline timeline is left to W&B and the report.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from moe_runtime.errors import ConfigError
from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, flat_values
from moe_runtime.metrics.panels import panel_of
from moe_runtime.metrics.system import system_facts

_OTHER = "Other"


class TensorBoardCopy:
    """An open run.

    Args:
        folder: new or empty; where TensorBoard's file goes.
        config: shown as a text.

    Raises:
        ConfigError: the package is missing.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import FileWriter, summary
        except ImportError as error:
            text = f"tensorboard: expected the package, got none ({error}); pip install tensorboard"
            raise ConfigError(text) from None
        self._writer, self._make = FileWriter(str(folder)), summary
        shown = yaml.safe_dump({**config, "system": system_facts()}, sort_keys=False)
        self._writer.add_summary(self._make.text("config", _verbatim(shown)))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """A line of metrics.jsonl; words in it are left out, for here is no place for them."""
        numbers = {key: value for key, value in flat_values(record).items() if isinstance(value, int | float)}
        self._writer.add_summary(_scalars(numbers), step)

    def sample(self, step: int, text: str) -> None:
        """A generated text."""
        self._writer.add_summary(self._make.text(SAMPLES, _verbatim(text)), step)

    def alert(self, event: Mapping[str, Any]) -> None:
        """An event of kind `alert`."""
        said = _verbatim(f"{event.get('alert')}: {event.get('message')}")
        self._writer.add_summary(self._make.text(ALERTS, said), event["step"])

    def heatmap(self, step: int, layers: Sequence[str], load: ArrayLike) -> None:
        """The load [layers, experts] of every expert."""
        from moe_runtime.metrics.heatmap_picture import draw_heatmap

        picture = np.asarray(draw_heatmap(layers, load))
        self._writer.add_summary(self._make.image(f"Routing/{HEATMAP}", picture, dataformats="HWC"), step)

    def timeline(self, step: int, svg: str) -> None:
        """Left out."""

    def finish(self) -> None:
        """Write everything to disk."""
        self._writer.close()


def _scalars(numbers: Mapping[str, float]) -> Any:
    """The numbers of a step as one message: torch's own writer makes one of each, ten times as slow.

    Their old form (`simple_value`) is single precision; this is the new one.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    return Summary(
        value=[
            Summary.Value(
                tag=tag_of(key), tensor=TensorProto(dtype="DT_DOUBLE", double_val=[value]), metadata=about
            )
            for key, value in numbers.items()
        ]
    )


@cache
def tag_of(key: str) -> str:
    """The name under which TensorBoard has a flat key."""
    panel = panel_of(key)
    return f"{panel.section if panel else _OTHER}/{key}"


def _verbatim(text: str) -> str:
    """As Markdown that shows the text as it is: every line indented as code."""
    return "".join(f"    {line}\n" for line in text.splitlines())
