"""Files, bases and overrides become one run, or one list of what is wrong with them."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config.load import dump_config, find_config, load_config
from moe_runtime.errors import ConfigError
from tests.unit.config.samples import build, refusal, values, write


def test_later_bases_win_over_earlier_ones_and_the_file_over_both(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", seed=1, name="a", optim={"eps": 0.1, "peak_lr": 0.1, "grad_clip": 0.1})
    (tmp_path / "b.yaml").write_text("name: b\noptim: {peak_lr: 0.2, grad_clip: 0.2}\n")
    top = tmp_path / "top.yaml"
    top.write_text("bases: [a.yaml, b.yaml]\noptim: {grad_clip: 0.3}\n")
    run = load_config(top)
    assert (run.seed, run.name) == (1, "b")
    assert (run.optim.eps, run.optim.peak_lr, run.optim.grad_clip) == (0.1, 0.2, 0.3)


def test_bases_have_bases_and_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    write(tmp_path / "low" / "ground.yaml", seed=7)
    (tmp_path / "low" / "middle.yaml").write_text("bases: [ground.yaml]\nname: middle\n")
    top = tmp_path / "top.yaml"
    top.write_text("bases: [low/middle.yaml]\n")
    run = load_config(top)
    assert (run.seed, run.name) == (7, "middle")


def test_a_base_shared_by_two_bases_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "ground.yaml", seed=7)
    for side in ("left", "right"):
        (tmp_path / f"{side}.yaml").write_text(f"bases: [ground.yaml]\nname: {side}\n")
    top = tmp_path / "top.yaml"
    top.write_text("bases: [left.yaml, right.yaml]\n")
    assert load_config(top).name == "right"


def test_a_circle_of_bases_is_shown_whole(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"bases: [{base}.yaml]\n")
    (line,) = refusal(tmp_path / "a.yaml")
    assert "a file cannot be its own base" in line
    assert [word.rpartition("/")[2] for word in line.split(": ")[-1].split(" -> ")] == [
        "a.yaml",
        "b.yaml",
        "c.yaml",
        "a.yaml",
    ]


def test_a_sequence_is_replaced_and_null_takes_a_section_away(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", model={"yarn": {"factor": 8.0}}, optim={"betas": [0.5, 0.6]})
    top = tmp_path / "top.yaml"
    top.write_text("bases: [a.yaml]\nmodel: {yarn: null}\noptim: {betas: [0.7, 0.8]}\n")
    run = load_config(top)
    assert run.model.yarn is None and run.optim.betas == (0.7, 0.8)


def test_a_config_goes_by_name_path_or_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "config.yaml", name="here")
    assert load_config(tmp_path).name == "here"
    assert (
        load_config("quickstart")
        == load_config("configs/run/quickstart.yaml")
        == load_config("run/quickstart")
    )
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart").name == "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("quikstart", "did you mean quickstart?"), ("xyz", "in configs/run: calibrate, medium, quickstart")],
)
def test_a_missing_config_is_told_with_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="no such config file") as caught:
        load_config(name)
    assert hint in str(caught.value)


def test_all_missing_bases_are_told_with_suggestions(tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("bases: [model/tinny.yaml, nothing_like_it.yaml]\n")
    near, far = refusal(top)
    assert "no such file model/tinny.yaml; did you mean model/tiny.yaml?" in near
    assert "no such file nothing_like_it.yaml; give it relative to configs/" in far


@pytest.mark.parametrize("bases", ["model/tiny.yaml", "[1]", "{a: b}"])
def test_bases_are_a_list_of_files(tmp_path: Path, bases: str) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(f"# first line\nbases: {bases}\n")
    (line,) = refusal(top)
    assert f"{top}:2: bases: expected a list of files" in line


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("name: x\nmodel: {hidden_size: 3\nbatch: 1\n")
    (line,) = refusal(top)
    assert line.startswith(f"{top}:3: is not valid YAML")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "name: !!python/name:os.system ''"])
def test_tags_that_would_run_code_are_no_valid_yaml(tmp_path: Path, text: str) -> None:
    top = tmp_path / "top.yaml"
    top.write_text(text)
    assert refusal(top)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n- b\n", b"just a word\n"])
def test_a_file_that_is_no_config_is_told_in_plain_words(tmp_path: Path, content: bytes) -> None:
    top = tmp_path / "top.yaml"
    top.write_bytes(content)
    assert all(str(top) in line for line in refusal(top)) and refusal(top)


def test_a_key_that_stands_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml")
    first = top.read_text().splitlines().index("  seq_len: 16") + 1
    top.write_text(top.read_text().replace("  seq_len: 16\n", "  seq_len: 16\n  seq_len: 32\n"))
    (line,) = refusal(top)
    assert line == f"{top}:{first + 1}: batch.seq_len: stands here twice, first at {top}:{first}"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.peak_lr=1e-4", "optim", "peak_lr", 1e-4),
        ("optim.peak_lr=2E+2", "optim", "peak_lr", 200.0),
        ("recipe.constant_until_tokens=469e9", "recipe", "constant_until_tokens", 469_000_000_000),
        ("train.total_tokens=1_000", "train", "total_tokens", 1000),
        ("optim.betas=[0.5, 0.6]", "optim", "betas", (0.5, 0.6)),
        ("layout.layers_per_stage=null", "layout", "layers_per_stage", None),
        ("recompute.norm=true", "recompute", "norm", True),
        ("metrics.wandb=off", "metrics", "wandb", "off"),
        ("data.path=a=b", "data", "path", "a=b"),
        ("data.source=dir:/x y", "data", "source", "dir:/x y"),
        ("train.sample_prompt='def '", "train", "sample_prompt", "def "),
    ],
)
def test_an_override_is_typed_as_yaml(
    tmp_path: Path, override: str, section: str, key: str, value: object
) -> None:
    run = load_config(write(tmp_path / "a.yaml"), [override])
    got = getattr(getattr(run, section), key)
    assert got == value and type(got) is type(value)


def test_overrides_win_over_the_file_and_the_last_one_over_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", optim={"peak_lr": 0.1})
    run = load_config(path, ["optim.peak_lr=0.2", "model.yarn.factor=4", "optim.peak_lr=0.3"])
    assert run.optim.peak_lr == 0.3 and run.model.yarn is not None and run.model.yarn.factor == 4.0


@pytest.mark.parametrize("override", ["optim.peak_lr", "=3", ".a=3", "optim..eps=1", "optim.betas=[1, "])
def test_an_override_of_no_sense_is_refused_as_such(tmp_path: Path, override: str) -> None:
    lines = refusal(write(tmp_path / "a.yaml"), override)
    assert len(lines) == 1 and lines[0].startswith("override")


def test_numbers_in_power_form_are_numbers_in_files_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml")
    path.write_text(path.read_text() + "optim: {peak_lr: 1e-4, eps: 1.0e-8, weight_decay: 1E-1}\n")
    optim = load_config(path).optim
    assert (optim.peak_lr, optim.eps, optim.weight_decay) == (1e-4, 1e-8, 0.1)


@settings(max_examples=30, deadline=None)
@given(
    peak_lr=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**62),
    prompt=st.text(st.characters(blacklist_categories=("Cs",))),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_dump_and_load_give_an_equal_run(
    tmp_path_factory: pytest.TempPathFactory, peak_lr: float, seed: int, prompt: str, betas: tuple
) -> None:
    folder = tmp_path_factory.mktemp("round")
    run = build(seed=seed, train={"sample_prompt": prompt}, optim={"peak_lr": peak_lr, "betas": betas})
    (folder / "b.yaml").write_text(dump_config(run), encoding="utf-8")
    assert load_config(folder / "b.yaml") == run


@pytest.mark.parametrize("name", ["1e4", "7E-3", "12", "1_000", "true", "off", "null", "2026-01-31", "1:30"])
def test_a_name_that_looks_like_something_else_stays_text(tmp_path: Path, name: str) -> None:
    run = build(train={"sample_prompt": name}, data={"tokenizer": name})
    (tmp_path / "b.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "b.yaml") == run


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\r", "\ufeff", "\x00", "语"], ids=ascii)
def test_a_prompt_keeps_rare_characters(tmp_path: Path, mark: str) -> None:
    run = build(train={"sample_prompt": f"a {mark} {mark}b\n {mark}"})
    (tmp_path / "b.yaml").write_bytes(dump_config(run).encode())
    assert load_config(tmp_path / "b.yaml") == run


def test_a_dump_says_every_key_and_needs_no_base(tmp_path: Path) -> None:
    run = load_config("quickstart")
    dumped = yaml.safe_load(dump_config(run))
    assert "bases" not in dumped
    assert set(dumped) == set(type(run).model_fields)
    assert set(dumped["model"]) == set(type(run.model).model_fields) - {"attention"}  # mla: not said


def test_a_run_cannot_be_changed(tmp_path: Path) -> None:
    run = load_config(write(tmp_path / "a.yaml"))
    with pytest.raises(ValueError, match="frozen"):
        run.optim.peak_lr = 1.0  # type: ignore[misc]
    assert values()["train"]["total_steps"] == run.train.total_steps


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: &a {x: *a}", "nested too deep"),
        ("seed: " + "[" * 1500, "nested too deep"),
        ("seed: !!int abc", "seed: is not a value in YAML"),
        ("seed: " + "9" * 5000, "seed: is not a value in YAML"),
        ("[a, b]: 1", "expected a word as key, got a list or a section"),
        ("name: x\n---\nname: y", "is not valid YAML: but found another document"),
    ],
)
def test_yaml_that_is_hard_to_read_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "a.yaml")
    if not text.startswith("model"):
        text = path.read_text() + text
    path.write_text(text)
    assert says in refusal(path)[0]


def test_a_date_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml")
    assert load_config(path, ["name=2026-01-31"]).name == "2026-01-31"
    assert load_config(path, ["name=2026-13-45"]).name == "2026-13-45"


@pytest.mark.parametrize(
    ("name", "got"), [(".", "a folder without config.yaml"), ("/dev/null", "something else")]
)
def test_what_is_there_but_is_no_config_is_told_as_that(
    name: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"expected a regular file, a run folder or .*, got {got}"):
        load_config(name)
