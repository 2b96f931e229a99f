"""Every mistake of a file is told at once: where it stands, what was expected, what comes close."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.secrets import find_secrets
from moe_runtime.config.suggest import key_paths
from moe_runtime.errors import ConfigError
from tests.unit.config.samples import refusal, typos_of, values, write


def test_a_file_with_a_slip_in_any_key_is_refused_at_its_line(tmp_path: Path) -> None:
    run = load_config(write(tmp_path / "a.yaml", model={"yarn": {}}))
    sound = run.model_dump(mode="json")
    path = tmp_path / "b.yaml"
    fields = [path for path in key_paths() if not {"NAME", "N"} & set(path)]
    for number, field in enumerate(fields):
        typos = typos_of(field)
        # A slip may look like a secret (sample_token), which is refused before and with other words.
        harmless = [typo for typo in typos if not list(find_secrets({typo: "here"}))]
        typo = harmless[number % len(harmless)]
        path.write_text(_with_key(sound, (*field[:-1], typo)))
        line_number = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if "'here'" in text)
        (line,) = refusal(path)
        assert line.startswith(f"{path}:{line_number}: {'.'.join((*field[:-1], typo))}: unknown key"), line


def _with_key(sound: dict[str, Any], path: tuple[str, ...]) -> str:
    """A sound run as YAML, with one more key, which is 'here'."""
    run = copy.deepcopy(sound)
    section = run
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = "here"
    return json.dumps(run, indent=1).replace('"here"', "'here'")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("seq_len", "batch.seq_len"),
        ("lr.peak_lr", None),
        ("model.seq_len", "batch.seq_len"),
        ("optim.bias_gamma", "recipe.bias_gamma"),
        ("layout.micro_batch_size", "batch.micro_batch_size"),
        ("train.seed", "seed"),
        ("model.yarn.rope_theta", "model.rope_theta"),
    ],
)
def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(
    tmp_path: Path, key: str, meant: str | None
) -> None:
    lines = refusal(write(tmp_path / "a.yaml"), f"{key}=1")
    assert "unknown key" in lines[0]
    assert meant is None or f"did you mean {meant}?" in lines[0]


def test_all_mistakes_of_a_file_and_its_base_are_told_together_each_at_its_line(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("model:\n  hiden_size: 3\n  top_k: 99\n  num_heads: two\noptim: {peak_lr: -1}\n")
    top = tmp_path / "top.yaml"
    top.write_text(
        "bases: [base.yaml]\n"
        "seed: yes\n"
        "layout:\n"
        "  pp: 3\n"
        "  schedule: dualpipee\n"
        "batch: {seq_len: 16, global_batch_size: 7}\n"
        "batch: {seq_len: 16, global_batch_size: 7, ramp_tokens: 5}\n"
    )
    lines = refusal(top, "optim.betas=[0.9, 1.0]", "nmae=x", "model.kv_lora_rank=1.5")
    for wanted in (
        f"{base}:2: model.hiden_size: unknown key; did you mean model.hidden_size?",
        f"{base}:4: model.num_heads: expected a whole number, got text 'two'",
        f"{base}:5: optim.peak_lr: expected more than 0, got -1",
        f"{base}:1: model.vocab_size: required key is missing",
        f"{top}:2: seed: expected a number or a word, not a truth value, got true",
        f"{top}:5: layout.schedule: expected one of 'auto', 'single', 'gpipe', '1f1b', 'interleaved', "
        "'zb1p', 'zbv', 'dualpipe', 'dualpipev' or 'searched', got text 'dualpipee'; did you mean dualpipe?",
        f"{top}:7: batch: stands here twice, first at {top}:6",
        f"{top}:7: batch.ramp_tokens: a ramp needs ramp_start_size too; without a ramp leave ramp_tokens 0",
        f"{top}: data: required key is missing",
        "override: nmae: unknown key; did you mean name?",
        "override: model.kv_lora_rank: expected a whole number, got 1.5",
        f"{top}: train.total_steps: set total_steps or total_tokens, else training would never end",
    ):
        assert any(line.startswith(wanted) for line in lines), f"{wanted}\n--\n" + "\n".join(lines)


_WRONG = [
    ("model.hidden_size", "abc", "expected a whole number, got text 'abc'"),
    ("model.hidden_size", "1.5", "expected a whole number, got 1.5"),
    ("model.hidden_size", "0", "expected more than 0, got 0"),
    ("model.hidden_size", "-3", "expected more than 0, got -3"),
    ("model.hidden_size", "null", "expected a whole number, got null"),
    ("model.hidden_size", "true", "not a truth value"),
    ("model.hidden_size", "[1]", "expected a whole number, got the list [1]"),
    ("model.hidden_size", "{a: 1}", "expected a whole number, got a section with keys a"),
    ("model.qk_rope_head_dim", "5", "expected a multiple of 2, got 5"),
    ("model.mtp_depth", "-1", "expected at least 0, got -1"),
    ("model.num_dense_layers", "5", "expected 0 to num_layers 4, got 5"),
    ("model.num_groups", "3", "expected a divisor of num_experts 8, got 3; nearest: 2, 4"),
    ("model.num_groups_kept", "2", "expected 1 to num_groups 1, got 2"),
    ("model.top_k", "9", "expected at most the 8 experts of kept groups, got 9"),
    ("model.yarn", "3", "expected a section (keys and values), got 3"),
    ("model.yarn.beta_fast", "0.5", "expected more than beta_slow 1, got 0.5"),
    ("model.rope_theta", "nan", "expected a finite number, got text 'nan'"),
    ("model.rope_theta", ".nan", "expected a finite number"),
    ("model.rope_theta", ".inf", "expected a finite number"),
    ("optim", "fast", "expected a section (keys and values), got text 'fast'"),
    ("optim.peak_lr", "fast", "expected a number, got text 'fast'"),
    ("optim.peak_lr", "0", "expected more than 0, got 0; the default is 0.00022"),
    ("optim.betas", "[0.9]", "expected a list with more values"),
    ("optim.betas", "[0.9, 0.9, 0.9]", "expected a list of 2"),
    ("optim.betas", "0.9", "expected a list, got 0.9"),
    ("optim.betas", "[0.9, 1.5]", "expected at most 1, got 1.5; the default is [0.9, 0.95]"),
    ("optim.betas", "[0.9, 1.0]", "optim.betas.1: expected less than 1, got 1"),
    ("optim.moments", "fp9", "expected one of 'fp32', 'bf16' or 'fp8', got text 'fp9'; did you mean fp8?"),
    ("recompute.norm", "3", "expected true or false, got 3"),
    ("recompute.norm", "perhaps", "expected true or false, got text 'perhaps'"),
    ("recipe.min_lr_ratio", "1.5", "expected at most 1, got 1.5"),
    ("recipe.cosine_tokens", "9", "has no effect while constant_until_tokens is null"),
    ("data.validation_fraction", "0.5", "expected less than 0.5, got 0.5"),
    ("data.path", "3", "expected text, got 3"),
    ("batch.ramp_start_size", "2", "a ramp needs ramp_tokens too"),
    ("batch.ramp_tokens", "2", "a ramp needs ramp_start_size too"),
    ("layout.zero_stage", "3", "expected one of 1 or 2, got 3"),
    ("layout.layers_per_stage", "[1, -1]", "layout.layers_per_stage.1: expected at least 0, got -1"),
    ("name", "../x", "name: expected text of the form"),
    ("name", "''", "name: expected text of the form"),
    ("metrics.wandb", "of", "did you mean off?"),
    ("device", "cuda:0", "expected one of 'auto', 'cpu' or 'cuda', got text 'cuda:0'; did you mean cuda?"),
    ("train.total_steps", "null", "set total_steps or total_tokens"),
]


@pytest.mark.parametrize(("key", "value", "says"), _WRONG, ids=[f"{key}={v}" for key, v, _ in _WRONG])
def test_a_wrong_value_is_told_once_with_what_was_expected(
    tmp_path: Path, key: str, value: str, says: str
) -> None:
    (line,) = refusal(write(tmp_path / "a.yaml"), f"{key}={value}")
    assert line.startswith(f"override: {key}") and says in line, line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp64", "device": "cuda"}, "device: precision fp64 is for proofs on the CPU"),
        (
            {"model": {"yarn": {"factor": 2.0, "original_seq_len": 4}}},
            "batch.seq_len: expected at most factor x original_seq_len = 8 of model.yarn, got 16",
        ),
        (
            {"model": {"num_groups": 8, "num_groups_kept": 8}},
            "model.num_groups: expected at most 4, for a group is scored by its two best experts, got 8",
        ),
        (
            {"batch": {"ramp_start_size": 9, "ramp_tokens": 5}},
            "batch.ramp_start_size: expected at most global_batch_size 8, got 9",
        ),
    ],
)
def test_sections_that_do_not_fit_each_other_are_told(tmp_path: Path, changes: dict, says: str) -> None:
    (line,) = refusal(write(tmp_path / "a.yaml", **changes))
    assert says in line


def test_a_required_section_that_is_missing_is_one_mistake_not_one_for_each_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    sections = values()
    del sections["model"]
    write(path)
    path.write_text(path.read_text().partition("batch:")[1] + path.read_text().partition("batch:")[2])
    (line,) = refusal(path)
    assert line == f"{path}: model: required key is missing"


def test_an_endless_value_is_cut_short(tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path / "a.yaml"), f"model.hidden_size={'x' * 5000}")
    assert len(line) < 250


def test_mistakes_are_one_error_of_the_users_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "a.yaml", seed=-1))
    assert caught.value.exit_code == 2 and caught.value.__cause__ is None


def test_a_list_of_sections_given_by_numbers_is_shown_as_it_works(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml")
    (line,) = refusal(file, "alerts.custom.0.name=x")
    assert line.endswith(
        "got a section with keys 0; give the whole list, such as 'alerts.custom=[{name: x}]'"
    )
