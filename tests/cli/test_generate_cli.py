"""`generate`: its options, what it prints and says, and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moe_runtime.cli.app import app
from moe_runtime.errors import ConfigError
from tests.cli.small_checkpoint import make_checkpoint

LONG = "a prompt of more than a block, " * 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that differ enough for drafts to stand now and then."""
    return make_checkpoint(tmp_path_factory.mktemp("made"))


def run(*arguments: object, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=typed, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def answer(made: Path, *options: object) -> dict:
    return json.loads(run("generate", made, *options, "--json").stdout)


def test_speculation_changes_nothing_in_greedy_text_but_the_number_of_passes(made: Path) -> None:
    options = ("--prompt", "once upon", "--temperature", 0, "--max-tokens", 40)
    plain = answer(made, *options, "--no-speculate")
    for drafts in (1, 3):
        drafted = answer(made, *options, "--speculate", "--drafts", drafts)
        assert drafted["tokens"] == plain["tokens"]
        assert len(drafted["acceptance"]) == len(drafted["drafted"]) == drafts
    to_the_end = plain["finish_reason"] == "stop"  # then one more token was made, and not given out
    assert plain["passes"] == len(plain["tokens"]) - 1 + to_the_end and plain["acceptance"] == []


def test_several_prompts_come_out_as_each_would_alone(made: Path) -> None:
    both = answer(made, "--prompt", "one", "--prompt", "another, longer", "--max-tokens", 12)
    assert [one["prompt"] for one in both["results"]] == ["one", "another, longer"]
    alone = answer(made, "--prompt", "another, longer", "--max-tokens", 12, "--seed", 1)
    assert both["results"][1]["tokens"] == alone["tokens"], "prompt i has seed + i"


def test_text_is_streamed_and_figures_go_to_the_standard_error(made: Path) -> None:
    options = ("--prompt", "the ", "--max-tokens", 9)
    result = run("generate", made, *options)
    assert result.stdout == "the " + answer(made, *options)["text"] + "\n"
    assert "tokens a pass, drafts accepted" in result.stderr and "9 tokens in" in result.stderr


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(made: Path) -> None:
    options = ("--prompt", "the ", "--max-tokens", 40, "--temperature", 0)
    text = answer(made, *options)["text"]
    stop = text[5:7]
    said = answer(made, *options, "--stop", stop)
    assert said["text"] == text[: text.index(stop)] and said["finish_reason"] == "stop"


def test_a_prompt_is_found_again_on_disk_and_the_answer_is_the_same(made: Path, tmp_path: Path) -> None:
    options = ("--prompt", LONG, "--max-tokens", 10, "--cache-dir", tmp_path / "kept")
    first, again = answer(made, *options), answer(made, *options)
    assert first["prompt_cache_hit_tokens"] == 0 and again["prompt_cache_hit_tokens"] == 128
    assert again["prompt_cache_miss_tokens"] == len(LONG) - 128
    assert first["tokens"] == again["tokens"]


def test_interactive_mode_goes_on_with_the_last_text(made: Path) -> None:
    options = ("--interactive", "--max-tokens", 5, "--temperature", 0)
    result = run("generate", made, *options, typed=f"{LONG}\n\nother\n")
    first, second, other = result.stdout.splitlines()[0:3] if "\n" in result.stdout else ("", "", "")
    assert first.startswith(LONG) and second.startswith(LONG) and other.startswith("other")
    figures = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert "| 0 of 155 from the cache" in figures[0] and "| 128 of 160 from the cache" in figures[1]


def test_prompts_may_be_ids_or_a_file(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("ab")
    options = ("--max-tokens", 6)
    tokens = answer(made, "--prompt", "ab", *options)["tokens"]
    assert answer(made, "--prompt-file", file, *options)["tokens"] == tokens
    said = answer(made, "--prompt-ids", "97, 98", *options)
    assert said["tokens"] == tokens and said["prompt"] == "ab"


def test_without_a_tokenizer_ids_are_continued_and_text_is_refused(tmp_path: Path) -> None:
    bare = make_checkpoint(tmp_path, tokenizer=False)
    assert len(answer(bare, "--prompt-ids", "5", "--max-tokens", 3)["tokens"]) == 3
    assert answer(bare, "--prompt", "ab", "--tokenizer", "byte", "--max-tokens", 3)["prompt_tokens"] == 2
    with pytest.raises(ConfigError, match="expected a tokenizer, got none; name one with --tokenizer"):
        run("generate", bare, "--prompt", "ab")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected --prompt, --prompt-file, --prompt-ids or --interactive"),
        (("--prompt-ids", "1,x"), "--prompt-ids: expected token ids such as 5,17,9, got '1,x'"),
        (("--prompt-ids", "9999"), "prompt: expected ids below the model's 264, got 9999"),
        (("--prompt-file", "missing.txt"), "--prompt-file missing.txt: expected a text file, got: No such"),
        (("--prompt", "a", "--interactive"), "--interactive: expected no prompts as options"),
        (("--prompt", "a", "--top-k", "-1"), "--top-k: expected 0 .all tokens. or more, got -1"),
        (("--prompt", "a", "--stop", ""), "stop: expected strings of at least one character"),
        (("--prompt", "a", "--dtype", "fp8"), "--dtype: expected one of fp32, bf16, got fp8"),
        (("--prompt", "a", "--cache-size", "much"), "--cache-size: expected bytes"),
        (("--prompt", "a", "--ep", "2"), "--ep 2: expected as many processes, got 1"),
    ],
)
def test_mistakes_are_told_in_one_line(made: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run("generate", made, *options)


def test_speculation_needs_mtp_modules(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path, mtp_depth=0)
    assert answer(plain, "--prompt", "a", "--max-tokens", 3)["drafts"] == 0
    with pytest.raises(ConfigError, match="--speculate: expected a model with MTP modules"):
        run("generate", plain, "--prompt", "a", "--speculate")


@pytest.mark.launcher
def test_experts_on_two_processes_give_the_text_of_one(made: Path) -> None:
    options = [
        "--prompt",
        "one",
        "--prompt",
        "two, and more",
        "--prompt",
        "3",
        "--max-tokens",
        "12",
        "--json",
    ]
    command = [sys.executable, "-m", "moe_runtime.cli.launch", "generate", str(made), *options, "--ep", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)["results"]
    alone = answer(made, *options)["results"]
    assert [one["tokens"] for one in said] == [one["tokens"] for one in alone]


def test_a_narrow_dtype_is_taken(made: Path) -> None:
    options = ("--prompt", "a", "--max-tokens", 3)
    narrow, wide = answer(made, *options, "--dtype", "bf16"), answer(made, *options)
    assert 2 * narrow["cache_bytes_per_token"] == wide["cache_bytes_per_token"]
