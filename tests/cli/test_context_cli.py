"""context: what it measures of checkpoints and shows again, how it refuses, and what the docs show of it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.cli.long_context.draw import draw
from moe_runtime.cli.long_context.record import Record, read_record
from moe_runtime.cli.long_context.table import tables
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request
from moe_runtime.errors import ConfigError, DataError, MoeRuntimeError
from tests.arch.sources import ROOT
from tests.cli.small_checkpoint import make_checkpoint

LENGTHS = ("--lengths", "48,96")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and three runs, one with YaRN."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "texts").mkdir()
    for number in range(6):
        text = f"document {number}: " + "the quick brown fox.\n" * 20
        (folder / "texts" / f"{number}.txt").write_text(text)
    prepare(Request(f"dir:{folder / 'texts'}", "byte", 0, 0.0, 0.3), folder / "data")
    make_checkpoint(folder / "plain")
    make_checkpoint(folder / "second", init_std=0.03)
    make_checkpoint(folder / "extended", yarn={"factor": 3.0, "original_seq_len": 48})
    return folder


def call(*arguments: object) -> str:
    """Standard output of a command; its error is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def measured(made: Path) -> tuple[Record, Path, str]:
    """What a call wrote, where, and what it printed."""
    plain, extended = made / "plain/run", made / "extended/run"
    models = (f"before={plain}", f"before={made / 'second/run'}", f"after={extended}")
    amounts = ("--windows", 3, "--questions", 2, "--yarn", 3, "--out", made / "found.json")
    said = call("context", "measure", *models, "--data", made / "data", *LENGTHS, *amounts)
    return read_record(made / "found.json"), made / "found.json", said


def test_models_are_measured_side_by_side(measured: tuple[Record, Path, str]) -> None:
    record, _, _ = measured
    untrained = "before, YaRN untrained"
    assert [one.label for one in record.models] == ["before", untrained, "before", untrained, "after"]
    assert [one.trained for one in record.models] == [True, False, True, False, True]
    assert record.models[0].position != record.models[2].position
    # The same weights, YaRN put on or saved with them: one model, so far as it goes.
    assert record.models[1].position == record.models[4].position != record.models[0].position
    assert {(cell.length, cell.questions) for cell in record.models[0].needle} == {(48, 2), (96, 2)}


def test_a_written_measurement_is_shown_again(measured: tuple[Record, Path, str]) -> None:
    _, path, said = measured
    shown = call("context", "table", path)
    assert said == shown
    assert "| before, YaRN untrained | 2 |" in shown and "| after | 1 |" in shown
    loss, needles = (call("context", "table", path, "--part", part) for part in ("loss", "needles"))
    assert f"{loss}\n{needles}" == shown and "Needles" not in loss
    with pytest.raises(ConfigError, match="--part: expected loss or needles, got 'all'"):
        call("context", "table", path, "--part", "all")


def test_a_drawing_has_a_line_and_a_band_for_each_label(measured: tuple[Record, Path, str]) -> None:
    _, path, _ = measured
    call("context", "table", path, "--svg", path.with_suffix(".svg"))
    root = ElementTree.fromstring(path.with_suffix(".svg").read_text())
    shapes = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert shapes.count("polyline") == shapes.count("polygon") == 3
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"old length", "0-15", "64-95", "before, YaRN untrained", "after"} <= set(texts)


def test_json_is_what_is_written(made: Path) -> None:
    few = ("--windows", 2, "--questions", 1, "--json", "--out", made / "one.json")
    said = call("context", "measure", made / "plain/run", "--data", made / "data", *LENGTHS, *few)
    assert said == (made / "one.json").read_text()
    assert json.loads(said)["models"][0]["label"] == str(made / "plain/run")


def test_what_a_file_holds_is_not_measured_again_and_other_terms_are_refused(made: Path) -> None:
    path, plain = made / "grown.json", made / "plain/run"
    options = ("--data", made / "data", *LENGTHS, "--questions", 1, "--out", path)
    call("context", "measure", f"a={plain}", *options, "--windows", 2)
    text = path.read_text()
    # A figure that no measuring would give shows where the second call had it from.
    share = read_record(path).models[0].position.inside.mean
    path.write_text(text.replace(str(share), "123.0"))
    call("context", "measure", f"b={plain}", f"a={plain}", *options, "--windows", 2)
    grown = read_record(path).models
    assert [(one.label, one.position.inside.mean) for one in grown] == [("b", share), ("a", 123.0)]
    call("context", "measure", f"a={plain}", *options, "--windows", 2, "--yarn", 3)
    thrice = read_record(path).models[1]
    call("context", "measure", f"a={plain}", *options, "--windows", 2, "--yarn", 8)
    assert read_record(path).models[0].position.inside.mean == 123.0
    assert read_record(path).models[1].position != thrice.position
    held = path.read_text()
    with pytest.raises(ConfigError, match="got other windows; name another file"):
        call("context", "measure", f"a={plain}", *options, "--windows", 3)
    assert path.read_text() == held


def test_the_same_weights_are_not_two_seeds(made: Path) -> None:
    twice = (f"a={made / 'plain/run'}", f"a={made / 'plain/run'}")
    with pytest.raises(ConfigError, match="expected each model once, got the same weights twice"):
        call("context", "measure", *twice, "--data", made / "data", *LENGTHS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--lengths", "96,48"), ConfigError, "--lengths: expected rising numbers"),
        (("--lengths", "many"), ConfigError, "got 'many'"),
        (("--lengths", "50,100"), ConfigError, "expected multiples of 16 for the old length"),
        (("--lengths", "32,64"), ConfigError, "lengths: expected above 40 tokens"),
        ((*LENGTHS, "--yarn", "1"), ConfigError, "--yarn: expected a factor above 1, got 1"),
        ((*LENGTHS, "--needles", "hay"), ConfigError, "--needles: expected random or taught, got 'hay'"),
        ((*LENGTHS, "--windows", "900"), DataError, "expected 900 windows of 96 tokens"),
        ((*LENGTHS, "--out", "/nowhere/x"), ConfigError, "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    made: Path, options: tuple[str, ...], error: type[MoeRuntimeError], message: str
) -> None:
    few = () if "--windows" in options else ("--windows", "2", "--questions", "1")
    with pytest.raises(error, match=message):
        call("context", "measure", made / "plain/run", "--data", made / "data", *options, *few)


def test_planted_text_can_be_prepared_and_its_needles_asked_for(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "planted.jsonl"
    said = call("context", "plant", "--data", made / "data", "--every", 20, "--out", out)
    assert f"--source {out}" in said
    prepare(Request(str(out), "byte", 0, 0.0, 0.3), tmp_path / "data")
    few = ("--windows", 2, "--questions", 1, "--needles", "taught", "--json")
    found = call("context", "measure", made / "plain/run", "--data", tmp_path / "data", *LENGTHS, *few)
    assert json.loads(found)["terms"]["form"]["key"] == "needle"
    with pytest.raises(ConfigError, match="--every: expected 1 character or more, got 0"):
        call("context", "plant", "--data", made / "data", "--every", 0, "--out", out)


def test_data_of_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    prepare(Request(f"dir:{made / 'texts'}", "bpe:265", 0, 0.0, 0.3), tmp_path / "other")
    with pytest.raises(DataError, match=r"other: expected ids of the tokenizer .* got those of bpe:265"):
        call("context", "measure", made / "plain/run", "--data", tmp_path / "other", *LENGTHS)


def test_a_label_without_a_path_is_refused(made: Path) -> None:
    with pytest.raises(ConfigError, match="before=: expected LABEL=PATH"):
        call("context", "measure", "before=", "--data", made / "data", *LENGTHS)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x\.json: terms: expected what .* wrote, got: Field required"):
        call("context", "table", tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file or directory; write one with"):
        call("context", "table", tmp_path / "none.json")


def test_the_docs_show_the_committed_measurements() -> None:
    text = (ROOT / "docs/context_extension.md").read_text()
    record, taught = (
        read_record(ROOT / f"benchmarks/results/context_{name}.json") for name in ("extension", "needles")
    )
    again = "write it anew, by the commands under `The runs of the tables`"
    assert tables(record, ["loss"]) in text, again
    assert tables(taught, ["needles"]) in text, again
    assert (ROOT / "docs/context_extension.svg").read_text() == draw(record), again
