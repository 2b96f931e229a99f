"""A machine without an account of W&B, and one run that was told everything."""

import os
from pathlib import Path

import pytest

from tests.unit.metrics.told_run import told_run


def _forget_account(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("NETRC", str(home / "netrc"))


@pytest.fixture
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no home: as on a fresh machine."""
    _forget_account(monkeypatch, tmp_path / "home")


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with W&B offline; not to be written into."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        _forget_account(patch, folder / "home")
        return told_run(folder / "run")
