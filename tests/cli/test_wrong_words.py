"""Bad input to every command: exit code 2, one line, no traceback."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from moe_runtime.cli.app import app
from moe_runtime.cli.usage import run_typer
from moe_runtime.errors import MoeRuntimeError
from tests.cli.small_run import ROOT

# Words, with files of `here`; what each of them finds depends on the command alone.
_CASES = [
    "trian",
    "--versoin",
    "train",
    "train nosuch",
    "train quickstart --nosuch",
    "train quickstart --inject nonsense",
    "train quickstart --wandb perhaps",
    "train quickstart --log-ranks x",
    "train junk.yaml",
    "prepare --source nosuch:thing --out o",
    "prepare --source dir:nosuch --out o",
    "prepare --source a.txt",
    "prepare --source a.txt --out o --tokenizer bpe:x",
    "prepare --source a.txt --out o --tokenizer nosuch",
    "prepare --source a.txt --out o --validation-fraction 2",
    "prepare --source junk.json --out o",
    "prepare --source bad.jsonl --out o",
    "prepare --source zero.jsonl --out o",
    "prepare --source a.txt --out a.txt",
    "prepare --source a.txt --out o --workers -1",
    "generate nosuch --prompt x",
    "generate runs/r --prompt x",
    "generate a.txt --prompt x",
    "generate runs/s --temperature hot",
    "generate runs/s --temperature -1",
    "eval nosuch --data x",
    "eval runs/s --device tpu --data x",
    "launch --nproc x train quickstart",
    "launch --nproc 3 train quickstart",
    "launch --hostfile nosuch train quickstart",
    "launch --nproc 2 prepare",
    "ablate quickstart",
    "ablate junk.yaml",
    "plan",
    "plan quickstart --cluster nosuch",
    "plan quickstart --cluster junk.yaml",
    "plan quickstart --imbalance 0",
    "plan quickstart --gpus 4",
    "plan --validate runs/s",
    "plan quickstart --page /proc/x/y",
    "plan quickstart --note --search",
    "chaos quickstart --kinds earthquake",
    "schedule nosuch --ranks 2 --microbatches 4",
    "schedule dualpipe --ranks 3 --microbatches 8",
    "schedule 1f1b --ranks 2 --microbatches 4 --costs F=x",
    "schedule 1f1b --trace junk.json",
    "compare nosuch",
    "checkpoint lst",
    "checkpoint ls a.txt",
    "checkpoint verify empty",
    "checkpoint show runs/s",
    "checkpoint prune runs/s --keep 0",
    "checkpoint diff nosuch other",
    "cache show nosuch",
    "cache clear a.txt",
    "doctor --jsn",
    "doctor now",
    "config show junk.yaml",
    "config show list.yaml",
    "config show empty",
    "config show broken",
    "config show quickstart seed",
    "config show quickstart optim={",
    "config show quickstart optm.peak_lr=1",
    "config show quickstart layout.dispatcher=alltoal",
    "config show ''",
    "config show 'a\nb'",
    "config show runs/r",
    "config diff quickstart nosuch",
    "config keys qqqq",
    "config schema --out empty",
    "completion tcsh",
    "completion bash zsh",
    "context measure x",
    "context table junk.json",
    "context plant --data empty --out o",
    "convert tasks bad.jsonl o",
    "convert export runs/r o --dtype fp7",
    "convert import hub o",
    "convert import empty o",
    "bench train --device tpu",
    "bench comm --links nosuch",
    "bench pipeline --layout nosuch",
    "bench fp8 --device tpu",
    "bench optim --device tpu",
    "bench generate nosuch",
    "metrics sync runs/s",
    "metrics sync runs/r --to paper",
    "metrics alerts nosuch",
    "metrics describe --nosuch",
    "report nosuch",
    "report a.txt",
    "report runs/s --port x",
    "report runs/s --out /proc/x/y",
    "dashboard nosuch",
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of no sense, for commands to stumble over."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "empty").mkdir()
    (folder / "hub").mkdir()
    (folder / "hub/config.json").write_text("[]")
    (folder / "runs/r").mkdir(parents=True)
    (folder / "runs/r/config.yaml").write_text("{")
    (folder / "runs/r/metrics.jsonl").write_text("nonsense\n")
    (folder / "runs/s").mkdir()
    (folder / "junk.yaml").write_bytes(b"\x00\xff\xfe" * 50)
    (folder / "junk.json").write_text("{")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "bad.jsonl").write_text("[1,2\n{}\n")
    (folder / "zero.jsonl").write_text("")
    (folder / "a.txt").write_text("x")
    (folder / "broken").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("case", [case for case in _CASES if not case.startswith("launch")])
def test_bad_input_is_one_line_and_code_2(case: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    with pytest.raises(MoeRuntimeError) as caught:
        run_typer(app, "moe-runtime", shlex.split(case))
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert said.strip() and "\n" not in said and "Traceback" not in said, said


@pytest.mark.parametrize("case", [case for case in _CASES if case.startswith("launch")])
def test_bad_input_to_the_launcher_is_one_line_and_code_2(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from moe_runtime.cli.launch import main

    monkeypatch.chdir(here)
    assert main(shlex.split(case)[1:], "moe-runtime launch") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_command_is_among_the_cases() -> None:
    root = typer.main.get_command(app)
    names: set[str] = set()

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if hasattr(node, "list_commands"):
            for name in node.list_commands(None):
                walk(node.get_command(None, name), (*path, name))
        else:
            names.add(" ".join(path))

    walk(root, ())
    assert len(_CASES) >= 50
    assert not {name for name in names if not any(f"{case} ".startswith(f"{name} ") for case in _CASES)}


@pytest.mark.parametrize(
    ("environment", "words", "says"),
    [
        ({"RANK": "abc"}, "train quickstart", "RANK: expected the whole number of a launcher, got abc"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "train quickstart", "WORLD_SIZE: expected the whole number"),
        ({"COLUMNS": "20"}, "config show nosuch", "nosuch: no such config file"),
    ],
)
def test_a_strange_environment_is_told_in_one_line(
    environment: dict[str, str], words: str, says: str
) -> None:
    done = _process(words, **environment)
    assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr


def _process(words: str, before: str = "", after: str = "", **environment: str) -> Any:
    return subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            f"{before}{sys.executable} -m moe_runtime {words}{after}",
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'comm'}"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("before", "words", "after", "code", "says"),
    [
        ("", "config schema", " | head -1", 0, ""),
        ("", "config show quickstart", " >/dev/full", 2, "standard output: expected room to write, got none"),
        (
            "d=$(mktemp -d); cd $d; rmdir $d; ",
            "config show quickstart",
            "",
            2,
            "the current folder was removed",
        ),
        ("", r"config show $'\xff'", "", 2, r"'\udcff': no such config file"),
        ("", r"config show quickstart $'name=\xff'", "", 2, r"override: expected text in UTF-8"),
    ],
)
def test_what_a_shell_can_do_to_a_command_ends_in_one_line_at_most(
    before: str, words: str, after: str, code: int, says: str
) -> None:
    done = _process(words, before, after)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(says) and done.stderr.count("\n") == (1 if says else 0), done.stderr
