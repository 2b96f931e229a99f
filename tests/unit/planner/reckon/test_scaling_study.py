"""The figures of docs/scaling.md are what its script says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[4]
DOC = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def study() -> ModuleType:
    found = importlib.util.spec_from_file_location("scaling_study", ROOT / "benchmarks" / "scaling.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["scaling_study"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def _line(text: str) -> str:
    return next(line for line in DOC.splitlines() if line.startswith(text))


def test_shares_that_train_are_those_of_the_page(study):
    for row in study.failures_table():
        assert "| " + " | ".join(row) + " |" in DOC


@pytest.mark.parametrize(
    ("pp", "ep", "schedule", "batch"), [(16, 32, "1f1b", 16384), (16, 16, "1f1b", 65536)]
)
def test_65536_gpus_are_what_the_page_says(study, pp, ep, schedule, batch):
    layout = study.Layout(65536, pp, ep, schedule, batch)
    point = study.reckon(layout, study.cluster_of("h800"))
    cells = [
        cell.strip() for cell in _line(f"| {batch:,} | {batch * 4096 / 1e6:,.0f} | {layout} |").split("|")
    ]
    assert point.rate == pytest.approx(float(cells[6].replace(",", "")), rel=0.02)
    assert point.memory_gb == pytest.approx(float(cells[10]), rel=0.03)


def test_the_published_layout_is_what_the_page_says(study):
    point = study.reckon(study.Layout(2048, 16, 64, "dualpipe", 15360), study.cluster_of("h800"))
    cells = [cell.strip() for cell in _line("| h800 |").split("|")]
    assert point.rate == pytest.approx(float(cells[3].replace(",", "")), rel=0.02)


def test_a_layout_too_large_for_memory_is_refused(study):
    with pytest.raises(study.ConfigError, match="do not fit"):
        study.reckon(study.Layout(256, 16, 16, "dualpipe"), study.cluster_of("h800"))
