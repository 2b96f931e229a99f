"""A rank killed at any point costs a few steps and nothing else: the resumed run ends with the same bits."""

from pathlib import Path

import pytest

from moe_runtime.checkpoint.folder import list_steps, step_of
from tests.cli.forked_run import train_under_faults
from tests.cli.small_run import digests, steps_done, write_config

STEPS, EVERY = 8, 2
PHASES = (
    "init",
    "data",
    "forward",
    "dispatch",
    "backward",
    "optimizer",
    "evaluate",
    "save_write",
    "save_rename",
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The config, and the tensors of an undisturbed run's last checkpoint."""
    folder = tmp_path_factory.mktemp("clean")
    config = write_config(folder, train__checkpoint_every=EVERY)
    assert train_under_faults(config, folder / "ranks", 2) is None
    return config, digests(folder / "runs" / "small", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), [(phase, rank) for phase in PHASES for rank in (0, 1)])
def test_a_killed_rank_loses_no_more_than_the_steps_since_a_checkpoint(
    phase: str, rank: int, clean: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    config, expected = clean
    step = "" if phase == "init" else ":step5"
    fault = f"sigkill:rank{rank}{step}:{phase}"
    arguments = [f"out_dir={tmp_path}", "--inject", fault]
    ended = train_under_faults(config, tmp_path / "first", 2, *arguments)
    assert ended is not None and ended.codes[rank] == -9 and ended.outcome.rank == rank
    assert ended.noticed_s < 5 * 2  # five times what is promised
    run_dir = tmp_path / "small"
    done = max(steps_done(run_dir), default=0)
    saved = max((step_of(path.name) or 0 for path in list_steps(run_dir / "checkpoints")), default=0)
    # A save that is being written when its rank dies is lost too.
    assert done - saved <= 2 * EVERY, (done, saved)
    assert train_under_faults(config, tmp_path / "second", 2, *arguments) is None
    assert digests(run_dir, STEPS) == expected
