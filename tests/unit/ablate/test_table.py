"""Tables: means with intervals, paired differences, gaps where nothing was measured, documents."""

from pathlib import Path

import pytest

from moe_runtime.cli.ablate.command import table_of_mark
from moe_runtime.cli.ablate.documents import fill, filled
from moe_runtime.cli.ablate.over_time import draw, over_time_table
from moe_runtime.cli.ablate.results import RESULTS
from moe_runtime.cli.ablate.study import Study, planned_runs
from moe_runtime.cli.ablate.table import study_table
from moe_runtime.errors import ConfigError
from tests.arch.sources import ROOT

BASE = ROOT / "configs/run/ablations/base.yaml"
STUDY = {
    "name": "dense",
    "question": "which?",
    "base": BASE.name,
    "arms": {"moe": [], "dense": ["model.num_dense_layers=3"]},
    "against": "dense",
    "columns": ["val_loss", "val_bpb", "params_active"],
}


def _result(loss: float, active: float = 300.0) -> dict:
    measures = {"val_loss": loss, "params_active": active}
    return {"measures": measures, "tokens": 100, "train_s": 5.0, "machine": "here", "curves": {}}


def _study_and_results(losses: dict[str, list[float]]):
    study = Study.model_validate(STUDY)
    runs = planned_runs(study, BASE)
    results = {
        run.key: _result(losses[run.arm][run.seed - 1]) for run in runs if run.seed <= len(losses[run.arm])
    }
    return study, runs, results


def _cells(table: str, arm: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_taken_seed_by_seed():
    table = study_table(*_study_and_results({"dense": [1.0, 2.0, 4.0], "moe": [0.99, 1.98, 3.96]}))
    assert _cells(table, "moe")[1].startswith("2.3100 ± ")
    assert _cells(table, "moe - dense")[1] == "-1.00% (-1.00 to -1.00), resolved"
    assert _cells(table, "dense")[3] == "300"  # exact: no interval
    assert "6 runs, seeds 1, 2, 3, 100 tokens each" in table


def test_what_seeds_do_not_agree_on_is_not_resolved():
    table = study_table(*_study_and_results({"dense": [1.0, 1.0, 1.0], "moe": [0.9, 1.1, 0.95]}))
    assert _cells(table, "moe - dense")[1].endswith("not resolved")


def test_one_seed_claims_nothing_and_gaps_are_told():
    table = study_table(*_study_and_results({"dense": [1.0, 1.1], "moe": [0.9]}))
    assert _cells(table, "moe - dense")[1] == "-10.00% (one seed)"
    assert "3 runs are missing" in table
    assert _cells(table, "moe")[2] == "-"
    nothing = study_table(*_study_and_results({"dense": [], "moe": []}))
    assert "No run of it has been measured yet" in nothing


def test_tables_of_a_document_are_made_again_and_the_prose_stays(tmp_path):
    mark = "<!-- ablate {}.yaml -->\n{}<!-- end -->\n"
    text = f"before\n{mark.format('a', 'old')}between\n{mark.format('b', '')}after\n"
    document = tmp_path / "d.md"
    document.write_text(text)
    assert fill(document, lambda name: f"table of {name}")
    assert "old" not in document.read_text()
    for kept in ("before", "table of a.yaml", "between", "table of b.yaml", "after"):
        assert kept in document.read_text()
    assert not fill(document, lambda name: f"table of {name}")


@pytest.mark.parametrize("text", ["no mark", "<!-- ablate a.yaml -->\nno end\n"])
def test_a_document_without_whole_marks_is_refused(text):
    with pytest.raises(ConfigError, match="marks"):
        filled(text, str)


def test_the_tables_of_the_document_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("docs/ablations.md").read_text()
    assert filled(text, lambda name: table_of_mark(name, RESULTS)) == text, "ablate docs/ablations.md --fill"


def test_arms_are_read_off_at_the_same_tokens_and_drawn(tmp_path):
    arms = {
        "a": [{"curves": {"loss": [[10, 3.0], [60, 2.0]]}}, {"curves": {"loss": [[10, 5.0], [60, 4.0]]}}],
        "b": [{"curves": {"loss": [[10, 1.5], [30, 1.0], [60, 0.5]]}}],
        "none": [{"curves": {}}],
    }
    lines = over_time_table("loss", arms).splitlines()
    assert "none" not in lines[0] and len(lines) == 4  # 30 is not a place that all runs have
    assert lines[2].startswith("| 10 | 4.000 ±") and lines[2].endswith("| 1.500 |")
    assert lines[3].startswith("| 60 | 3.000 ±") and lines[3].endswith("| 0.500 |")
    assert "has the curve" in over_time_table("violation", arms)
    apart = arms | {"b": [{"curves": {"loss": [[20, 1.0]]}}]}
    assert "at no number of tokens in common" in over_time_table("loss", apart)
    draw(["loss"], arms, "which?", tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text().count("<path") > 3
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(["loss"], arms, "which?", tmp_path / "loss.nothing")
