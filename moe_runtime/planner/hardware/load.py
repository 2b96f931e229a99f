"""From the name of a cluster, or its file, to a checked `Cluster`."""

import difflib
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from moe_runtime.config.explain import explain
from moe_runtime.config.tree import read_file, shown
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster, cluster_file


def load_cluster(name: str) -> Cluster:
    """A cluster by the name of a file in `configs/cluster`, or by a path.

    Raises:
        ConfigError: no such file, or it is wrong; one line for each mistake.
    """
    roots = config_roots()
    file = cluster_file(name, roots)
    if file is None:
        _unknown(name, roots)
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


def config_roots() -> list[Path]:
    """The folders `configs` here and beside the code."""
    beside_code = Path(__file__).resolve().parents[3] / "configs"
    return [root for root in (Path("configs"), beside_code) if root.is_dir()]


def _unknown(name: str, roots: list[Path]) -> NoReturn:
    known = sorted({file.stem for root in roots for file in (root / "cluster").glob("*.yaml")})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"in configs/cluster: {', '.join(known)}"
    raise ConfigError(f"{name}: no such cluster; {hint}")
