"""The wheel and the sdist: what they hold, and that they work where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from tests.cli.small_run import ROOT

_KERNEL = """
import comm, moe_comm, moe_runtime
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
client.execute("import comm, moe_comm; print('comm of', comm.create_comm.__module__)")
while True:
    message = client.get_iopub_msg(timeout=60)
    if message["msg_type"] == "stream":
        print(comm.__file__, message["content"]["text"])
        break
manager.shutdown_kernel(now=True)
"""


def _run(*command: object, folder: Path, timeout_s: float = 300) -> str:
    """Standard output of a command that must succeed, away from this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built as pip builds them, without its isolated environment."""
    folder = tmp_path_factory.mktemp("built")
    _run(sys.executable, "-m", "hatchling", "build", "-d", folder, folder=ROOT)
    return folder


def _wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_the_wheel_has_both_packages_typed_the_configs_and_the_command(built: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"moe_runtime", "moe_comm"}, "any other name could overwrite somebody's package"
    assert {"moe_runtime/py.typed", "moe_comm/py.typed"} <= names
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*") if file.is_file()}
    assert {f"moe_runtime/{name}" for name in configs} <= names
    for folder in ("moe_runtime", "comm/moe_comm"):
        files = {file.relative_to(ROOT / folder).as_posix() for file in (ROOT / folder).rglob("*.*")}
        own = {f"{Path(folder).name}/{name}" for name in files if "__pycache__" not in name}
        assert {name for name in own if not (ROOT / folder).joinpath(name).is_dir()} <= names


def test_the_wheel_names_its_command_and_its_extras(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if ".dist-info/" in name])
    (folder,) = tmp_path.glob("*.dist-info")
    found: Distribution = PathDistribution(folder)
    (command,) = found.entry_points
    assert (command.name, command.value) == ("moe-runtime", "moe_runtime.cli.app:main")
    extras = set(found.metadata.get_all("Provides-Extra") or [])
    assert {"mpi", "gpu", "data", "test", "report", "dashboard"} <= extras


def test_the_sdist_has_what_a_checkout_has(built: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no checkout: git knows of no files here")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked.stdout.split() if (ROOT / name).is_file()} <= names


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with Jupyter's kernel and the wheel; what else they need is borrowed from ours."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    _run(sys.executable, "-m", "venv", folder, folder=built)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    got = subprocess.run(
        [*pip, "--retries", "1", "ipykernel", "jupyter_client"], capture_output=True, text=True, timeout=300
    )
    if got.returncode:
        pytest.skip(f"pip cannot get ipykernel here: {got.stderr.strip().splitlines()[-1]}")
    _run(*pip, "--no-deps", "--no-index", _wheel(built), folder=built)
    # After its own packages: those of this environment, so that torch need not be downloaded again.
    ours = sysconfig.get_path("purelib")
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (site / "zz_borrowed.pth").write_text(f"{ours}\n")
    return folder


@pytest.mark.slow
def test_jupyters_comm_survives_and_its_kernel_starts(environment: Path, tmp_path: Path) -> None:
    said = _run(environment / "bin/python", "-c", _KERNEL, folder=tmp_path)
    assert said.startswith(str(environment)) and "comm of ipykernel" in said


@pytest.mark.slow
@pytest.mark.launcher
def test_an_installed_wheel_trains_the_quickstart_in_an_empty_folder(
    environment: Path, tmp_path: Path
) -> None:
    command = environment / "bin/moe-runtime"
    assert _run(command, "--version", folder=tmp_path).startswith("moe-runtime 0.")
    shown = _run(command, "config", "show", "quickstart", "--where", folder=tmp_path)
    assert str(environment) in shown
    few = ("train.total_steps=2", "train.eval_sequences=4", "train.sample_tokens=4", "metrics.wandb=off")
    _run(command, "train", "quickstart", *few, folder=tmp_path, timeout_s=600)
    records = (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    assert len(records) == 2
