"""Every machine that ships can be read, and says where each of its figures is from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from moe_runtime.planner.hardware.cluster import Cluster, Link
from moe_runtime.planner.hardware.estimate import Curve, Estimate

_FILES = sorted((Path(__file__).parents[3] / "configs" / "cluster").glob("*.yaml"))


def _read(file: Path) -> Cluster:
    return Cluster.model_validate(yaml.safe_load(file.read_text()))


def _figures(section: BaseModel, at: str = "") -> Iterator[tuple[str, Estimate | Curve, bool]]:
    """Path, figure, and whether what it stands in names a source for it."""
    for name in type(section).model_fields:
        value, path = getattr(section, name), f"{at}.{name}".lstrip(".")
        if isinstance(value, Estimate | Curve):
            yield path, value, isinstance(section, Link) and bool(section.source)
        elif isinstance(value, BaseModel):
            yield from _figures(value, path)


def test_the_chips_that_are_asked_for_most_are_there():
    assert {"h800", "h100", "h200", "b200", "gb200_nvl72", "mi300x"} <= {file.stem for file in _FILES}


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)
def test_a_cluster_file_says_where_its_figures_are_from(file):
    cluster = _read(file)
    assert cluster.name == file.stem and cluster.accelerator.source
    silent = [path for path, figure, is_covered in _figures(cluster) if not (figure.source or is_covered)]
    assert not silent, f"no source: {silent}"


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)
def test_shares_are_of_a_peak_and_a_fast_link_is_faster(file):
    cluster = _read(file)
    for path, figure, _ in _figures(cluster):
        if isinstance(figure, Curve):
            assert all(0 < point.value.high <= 1 for point in figure.points), path
    assert cluster.fast.gbps.central >= cluster.network.gbps.central
    assert cluster.communication.multiprocessors.high < cluster.accelerator.multiprocessors


def test_a_domain_of_72_joins_72():
    files = {file.stem: file for file in _FILES}
    assert _read(files["gb200_nvl72"]).accelerators_a_node == 72
