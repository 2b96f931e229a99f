"""A cluster as the file that it is read from."""

from typing import Any

import yaml

from moe_runtime.planner.hardware.cluster import Cluster

_HEAD = "# Made by `moe-runtime plan CONFIG --calibrate FILE`: measured, of one machine.\n"


def cluster_text(cluster: Cluster) -> str:
    """YAML that loads as the same cluster; ranges without width are numbers again."""
    values = _short(cluster.model_dump(exclude_none=True))
    return _HEAD + yaml.safe_dump(values, sort_keys=False, width=110)


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"low", "central", "high", "source"}:
            ends = {value["low"], value["central"], value["high"]}
            if len(ends) == 1 and not value["source"]:
                return value["central"]
        return {key: _short(each) for key, each in value.items() if each != ""}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
