"""The list of metrics: every row says what, in which unit and from where; the page in docs is made of it."""

import re
from pathlib import Path

from moe_runtime.metrics.page import page
from moe_runtime.metrics.record import GROUPS, METRICS, metric_of

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = (ROOT / "moe_runtime", ROOT / "comm")


def test_the_page_in_docs_is_made_of_the_list() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page(), "moe-runtime metrics describe --markdown"


def test_every_metric_is_described_once() -> None:
    assert sum(map(len, GROUPS.values())) == len(METRICS)
    for path, metric in METRICS.items():
        assert all(metric) and not metric.definition.endswith("."), path


def test_the_source_of_every_metric_is_a_file_that_exists() -> None:
    for path, metric in METRICS.items():
        (file,) = re.findall(r"[\w/]+\.py", metric.source)
        assert any((package / file).is_file() for package in PACKAGES), (path, file)


def test_a_path_with_names_of_the_run_finds_its_row() -> None:
    assert metric_of("layers/mtp.0.block/violation") is METRICS["layers/*/violation"]
    assert metric_of("val_sets/code/val_bpb") is METRICS["val_sets/*/val_bpb"]
    assert metric_of("routing/violation/max") is METRICS["routing/violation/max"]
    for unknown in ("layers", "layers/layers.3", "loss/x", "layers/layers.3/violation/max", ""):
        assert metric_of(unknown) is None
