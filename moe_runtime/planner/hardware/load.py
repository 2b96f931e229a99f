"""From the name of a cluster, or its file, to a checked `Cluster`."""

from typing import NoReturn

from pydantic import ValidationError

from moe_runtime.config.closest import closest
from moe_runtime.config.explain import explain
from moe_runtime.config.roots import config_names, config_roots
from moe_runtime.config.tree import read_file, shown
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster, cluster_file


def load_cluster(name: str) -> Cluster:
    """A cluster by the name of a file in `configs/cluster`, or by a path.

    Raises:
        ConfigError: no such file, or it is wrong; one line for each mistake.
    """
    file = cluster_file(name, config_roots())
    if file is None:
        _unknown(name)
    tree = read_file(file, lambda base, own: own.parent / base)
    try:
        cluster = Cluster.model_validate(tree.values)
    except ValidationError as error:
        lines = [
            f"{tree.place(tuple(one.key.split('.')), shown(file))}: {one.key}: {one.text}"
            for one in explain(error, of_run=False)
        ]
        raise ConfigError("\n".join([*tree.mistakes, *lines])) from None
    if tree.mistakes:
        raise ConfigError("\n".join(tree.mistakes))
    return cluster


def _unknown(name: str) -> NoReturn:
    known = sorted(config_names("cluster"))
    close = closest(name, known)
    hint = f"did you mean {close[0]}?" if close else f"in configs/cluster: {', '.join(known)}"
    raise ConfigError(f"{name}: no such cluster; {hint}")
