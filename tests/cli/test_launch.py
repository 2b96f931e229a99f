"""The launcher: its options, the way to several machines, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from moe_runtime.cli import app as command_line
from moe_runtime.cli import launch
from moe_runtime.cli.launchers.hostfile import deepspeed_command, read_hostfile
from moe_runtime.cli.network import free_port, is_public
from moe_runtime.errors import ConfigError
from tests.cli.small_run import ROOT, finish, run, start, steps_done, wait_for_step, write_config

_QUICKSTART = ("train", "quickstart")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nnodes", "two", *_QUICKSTART), "--nnodes: expected a whole number from 1, got 'two'"),
        (("--nnodes=0", *_QUICKSTART), "--nnodes: expected a whole number from 1, got '0'"),
        (("--nproc", "-1", *_QUICKSTART), "--nproc: expected"),
        (("--nodes=2", *_QUICKSTART), "unrecognized arguments: --nodes=2"),
        (("--master",), "--master: expected one argument"),
        (
            ("--nnodes", "3", "--master", "a:1", *_QUICKSTART),
            "expected a divisor of the 4 processes of pp 2 x dp 2",
        ),
        (("--nnodes", "2", *_QUICKSTART), "--master: expected HOST:PORT of machine 0"),
        (("--nnodes", "2", "--master", "a", *_QUICKSTART), "--master: expected HOST:PORT, such as"),
        (("--nnodes", "2", "--master", "a:0", *_QUICKSTART), "--master: expected HOST:PORT, such as"),
        (
            ("--nnodes", "2", "--node-rank", "2", "--master", "a:1", *_QUICKSTART),
            "--node-rank: expected 0 to 1, got 2",
        ),
        (
            ("--nnodes", "2:1", "--master", "a:1", *_QUICKSTART),
            "--nnodes: expected MIN:MAX with MIN not above MAX, got '2:1'",
        ),
        (
            ("--nnodes", "2", "--master", "no-such-host.invalid:1", *_QUICKSTART),
            "--master: no-such-host.invalid has no address, or there is no route to it",
        ),
        (("--nproc", "3", *_QUICKSTART), "layout: pp 2 x dp 2 needs 4 processes, got 3"),
        (
            ("--nnodes", "2", "generate"),
            "--nnodes is for train, the only command of several processes, got generate",
        ),
        (
            ("--hostfile", "none"),
            "--hostfile is for train, the only command of several processes, got no command",
        ),
        (("--hostfile", "x", "--nproc", "2", *_QUICKSTART), "--nproc does not go with --hostfile"),
        (
            ("--hostfile", "none", *_QUICKSTART),
            "--hostfile: no such file none; expected lines like `node0 slots=8`",
        ),
        (("train",), "launch.sh train: Missing argument 'config'"),
        (("train", "--fresher", "quickstart"), "no such option --fresher; did you mean --fresh?"),
        (("train", "quikstart"), "quikstart: no such config file; did you mean quickstart?"),
        (("train", "quickstart", "seed"), "override: expected key=value"),
        (("train", "quickstart", "sed=1"), "override: sed: unknown key; did you mean seed?"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert launch.main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert says in output.err


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trian",), "no such command 'trian'; did you mean train?"),
        (("checkpoint", "lst"), "no such command 'lst'; did you mean ls?"),
        (("generate", "--temperature", "x"), "Invalid value for '--temperature'"),
        (("config", "show"), "Missing argument 'config'"),
    ],
)
def test_a_wrong_command_of_one_process_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str
) -> None:
    code, output = run(*arguments)
    assert code == 2 and output.count("\n") == 1 and output.startswith("moe-runtime"), output
    assert says in output


@pytest.mark.launcher
def test_commands_of_one_process_pass_through_with_their_options() -> None:
    code, output = run("config", "show", "quickstart", "seed=5", "--json")
    assert code == 0
    assert json.loads(output)["config"]["seed"] == 5


def test_help_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    with mock.patch.object(sys, "argv", ["moe-runtime", "--help"]), pytest.raises(SystemExit) as end:
        command_line.main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in command_line.COMMANDS)


def test_help_of_the_script_lists_every_option(capsys: pytest.CaptureFixture) -> None:
    script = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), "--help"], capture_output=True, text=True, check=True
    )
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert not end.value.code
    options = {word for word in capsys.readouterr().out.split() if word.startswith("--")} - {"--help"}
    assert len(options) == 7 and all(option in script.stdout for option in options)
    for word in ("NCCL", "gloo", "TORCH_INDEX_URL", "PYTHON", "Ctrl-C", "--fresh", "test [--all]", "130"):
        assert word in script.stdout


@pytest.mark.parametrize(
    ("host", "public"),
    [("127.0.0.1", False), ("10.0.0.1", False), ("192.168.3.4", False), ("8.8.8.8", True), ("1.1.1.1", True)],
)
def test_an_address_of_the_open_internet_is_known(host: str, public: bool) -> None:
    assert is_public(host) is public


@pytest.mark.parametrize("form", [["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3"]])
@pytest.mark.parametrize("place", [0, 2])
def test_a_rank_takes_its_local_rank_from_any_launcher(form: list[str], place: int) -> None:
    from moe_runtime.__main__ import take_local_rank

    command = ["train", "quickstart"]
    assert take_local_rank([*command[:place], *form, *command[place:]]) == (command, "3")
    assert take_local_rank(command) == (command, None)


def _hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_with_comments_and_empty_lines(tmp_path: Path) -> None:
    path = _hostfile(tmp_path, "# two\nnode0 slots=8\n\n  node1   slots = 4 # small\n")
    assert read_hostfile(path) == {"node0": 8, "node1": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected lines like `node0 slots=8`, got none"),
        ("node0\n", ":1: expected a new host as `host slots=N`, got 'node0'"),
        ("a slots=2\nb slots=0\n", ":2: expected a new host"),
        ("a slots=2\na slots=2\n", ":2: expected a new host"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_shown(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(_hostfile(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "hosts")) and says in str(caught.value)


def test_one_machine_in_a_hostfile_needs_no_ssh(tmp_path: Path) -> None:
    path = _hostfile(tmp_path, "localhost slots=2\n")
    with mock.patch.dict(os.environ, {"PATH": ""}):
        line = deepspeed_command(path, {"localhost": 2}, ["train", "x.yaml", "a.b=[1, 2]"])
    assert line[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={path}", "--no_ssh_check", "--master_addr=127.0.0.1"} <= set(line)
    assert line[-5:] == ["--module", "moe_runtime", "train", "x.yaml", "a.b=[1, 2]"]


def test_several_machines_need_pdsh_and_get_the_variables_and_the_quoted_command(tmp_path: Path) -> None:
    path, hosts = _hostfile(tmp_path, "a slots=2\nb slots=2\n"), {"a": 2, "b": 2}
    with mock.patch.dict(os.environ, {"PATH": str(tmp_path)}), pytest.raises(ConfigError, match="install"):
        deepspeed_command(path, hosts, ["train", "x.yaml"])
    _stand_ins(tmp_path)
    with mock.patch.dict(
        os.environ, {"PATH": str(tmp_path), "OMP_NUM_THREADS": "3", "WANDB_MODE": "offline"}
    ):
        line = deepspeed_command(path, hosts, ["train", "x.yaml", "a.b=[1,2]", "c=d e"])
        passed_on = Path(os.environ["DS_ENV_FILE"]).read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "WANDB_MODE=offline"} <= set(passed_on)
    assert line[-3:] == ["x.yaml", "'a.b=[1,2]'", "c=d e"] and "--no_ssh_check" not in line


def _stand_ins(folder: Path) -> None:
    """A `pdsh` and an `ssh` that run on this machine what they are to run on others."""
    pdsh = (
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "at = sys.argv.index('-w')\n"
        "hosts, words = sys.argv[at + 1].split(','), ' '.join(sys.argv[at + 2 :])\n"
        "commands = [words.replace('%n', str(number)) for number in range(len(hosts))]\n"
        "started = [subprocess.Popen(['bash', '-c', command]) for command in commands]\n"
        "sys.exit(max(process.wait() for process in started))\n"
    )
    for name, text in (("pdsh", pdsh), ("ssh", "#!/bin/sh\necho 127.0.0.1\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def _temp_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temp folder for the programs that a test starts."""
    temp = folder / "temp"
    temp.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    return temp


def _left_in(temp: Path) -> list[str]:
    """What was left; torch's cache of compiled code is one for all runs, and stays."""
    return [path.name for path in temp.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.launcher
def test_two_launchers_train_together_and_leave_nothing_in_the_temp_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, train__total_steps=2, train__eval_every=0)
    temp = _temp_folder(tmp_path, monkeypatch)
    meeting = ("--nnodes", "2", "--master", f"127.0.0.1:{free_port()}")
    machines = [start(*meeting, "--node-rank", str(rank), "train", str(config)) for rank in (0, 1)]
    ends = [finish(machine) for machine in machines]
    assert [code for code, _ in ends] == [0, 0], ends
    assert ["step 2/2" in output for _, output in ends] == [True, False]
    assert steps_done(tmp_path / "runs" / "small") == [1, 2]
    assert _left_in(temp) == []


@pytest.mark.launcher
def test_a_hostfile_of_this_machine_trains_through_the_deepspeed_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, train__total_steps=2, train__eval_every=0)
    temp = _temp_folder(tmp_path, monkeypatch)
    code, output = run("--hostfile", str(_hostfile(tmp_path, "localhost slots=2\n")), "train", str(config))
    assert code == 0 and "step 2/2" in output, output
    assert _left_in(temp) == []


@pytest.mark.slow
@pytest.mark.launcher
def test_a_hostfile_of_two_machines_trains_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, train__total_steps=2, train__eval_every=0)
    temp = _temp_folder(tmp_path, monkeypatch)
    _stand_ins(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hosts = _hostfile(tmp_path, "node0 slots=1\nnode1 slots=1\n")
    code, output = run("--hostfile", str(hosts), "train", str(config), "layout.layers_per_stage=[2,0]")
    assert code == 0 and "step 2/2" in output and "nnodes=2" in output, output
    assert _left_in(temp) == []


def test_a_hostfile_that_does_not_fit_the_layout_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hosts = _hostfile(tmp_path, "a slots=2\nb slots=1\n")
    assert launch.main(["--hostfile", str(hosts), *_QUICKSTART]) == 2
    assert "layout: pp 2 x dp 2 needs 4 processes, got 3; start 4" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_itself_trains_and_restarts(tmp_path: Path) -> None:
    config = write_config(tmp_path, train__total_steps=4)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "moe_runtime", "train"]
    fault = ["--inject", "sigkill:rank1:step4:forward"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(config), *fault],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert steps_done(tmp_path / "runs" / "small") == [1, 2, 3, 4]
    events = (tmp_path / "runs" / "small" / "events.jsonl").read_text()
    assert "resuming after step" in events


@pytest.mark.slow
@pytest.mark.launcher
def test_a_run_goes_on_without_the_machine_whose_launcher_was_killed(tmp_path: Path) -> None:
    changes = {"train__total_steps": 60, "reliability": {"rejoin_s": 1.0}}
    config = write_config(tmp_path, layout={"dp": 2}, **changes)
    run_dir = tmp_path / "runs" / "small"
    meeting = ("--nnodes", "1:2", "--master", f"127.0.0.1:{free_port()}")
    machines = [start(*meeting, "--node-rank", str(rank), "train", str(config)) for rank in (0, 1)]
    wait_for_step(run_dir, 3, machines[0])
    machines[1].kill()
    code, output = finish(machines[0], 240.0)
    assert code == 0, output
    assert steps_done(run_dir) == list(range(1, 61))
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (fault,) = [event for event in events if event["kind"] == "fault"]
    assert "launcher of its machine is gone" in fault["cause"]
    assert [event["dp"] for event in events if event["kind"] == "shrink"] == [1]
