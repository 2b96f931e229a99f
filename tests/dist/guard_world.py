"""Short real runs with a number spoiled on the way: what the tests of the guards share.

One world does several runs after another, in one run folder each. All ranks hold the dense weights of both
stages (mirrored rows of DualPipe, and two lanes on four ranks), and pairs of them the same experts; experts
are the largest tensors here, so it is one of them that is struck.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_runtime.open_run import open_run
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.config.load import load_config
from moe_runtime.errors import DataError, NumericsError
from moe_runtime.parallel.progress import Progress
from moe_runtime.parallel.world import World
from moe_runtime.train.fault import read_faults
from moe_runtime.train.guard.poison import poison
from moe_runtime.train.guard.spoil import spoil
from moe_runtime.train.inject import Injector
from moe_runtime.train.loop import Run, train
from tests.cli.small_run import write_config
from tests.ranks import run_ranks

# By number of ranks. Mirrored rows alone are the cheap form of a world with replicas.
LAYOUTS: dict[int, dict[str, Any]] = {
    1: {},
    2: {"pp": 2, "schedule": "dualpipe"},
    4: {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"},
}


@dataclass(frozen=True)
class Strike:
    """What is spoiled where: at the first mark of `phase` in `step`, and in the steps after it too.

    Args:
        is_written: the guards take it for what the update wrote.
    """

    kind: str
    target: str
    rank: int
    step: int
    phase: str
    times: int = 1
    is_written: bool = False


@dataclass(frozen=True)
class Trial:
    """One run: its name, what it changes in the config, what strikes it, also as `--inject` has it."""

    name: str
    overrides: tuple[str, ...] = ()
    strikes: tuple[Strike, ...] = ()
    inject: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of a run.

    Args:
        error: of the run, if it ended by one of ours.
        hit: what the strikes of this rank hit.
    """

    error: str | None
    hit: list[str]


def smallest_batch(ranks: int) -> int:
    """Sequences that fill a layout of `LAYOUTS`."""
    return 2 * ranks


def write(folder: Path, layout: dict[str, Any], **changes: Any) -> str:
    """The config of all runs of a test module."""
    usual = {
        "train__eval_every": 0,
        "train__log_every": 100,
        "batch__global_batch_size": 8,
        "metrics__trace_step": None,
    }
    path = write_config(folder, layout=layout, **(usual | changes))
    run = yaml.safe_load(path.read_text())
    run["model"]["expert_ffn_size"] = 64
    path.write_text(yaml.safe_dump(run))
    return str(path)


def try_all(
    ranks: int, config: str, trials: tuple[Trial, ...], timeout_s: float = 120.0
) -> dict[str, list[Outcome]]:
    """All trials in one world; what each rank saw, by name."""
    outcomes = run_ranks(do_trials, ranks, config, trials, timeout_s=timeout_s)
    return {trial.name: [seen[i] for seen in outcomes] for i, trial in enumerate(trials)}


def do_trials(rank: int, world_size: int, config: str, trials: tuple[Trial, ...]) -> list[Outcome]:
    """Each trial in turn on one rank."""
    return [_do(rank, world_size, config, trial) for trial in trials]


def _do(rank: int, world_size: int, config: str, trial: Trial) -> Outcome:
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    run = open_run(load_config(config, (*trial.overrides, f"name={trial.name}")), world, fresh=False)
    hit: list[str] = []
    for strike in trial.strikes:
        if strike.rank == rank:
            _arm(run, strike, hit)
    if trial.inject:
        injector = Injector(read_faults(trial.inject), rank, run_dir(config, trial.name))
        injector.listen(run.runtime.clock.progress, partial(spoil, run.step))
    try:
        train(run)
    except (NumericsError, DataError) as error:
        return Outcome(str(error), hit)
    return Outcome(None, hit)


def _arm(run: Run, strike: Strike, hit: list[str]) -> None:
    left = list(range(strike.step, strike.step + strike.times))

    def on_mark(progress: Progress) -> None:
        if left and progress.step == left[0] and progress.phase == strike.phase:
            left.pop(0)
            hit.append(poison(run.runtime, run.state.optimizer, strike.kind, strike.target))
            if strike.is_written:
                run.step.integrity.take()

    run.runtime.clock.progress.listeners.append(on_mark)


def digests(config: str, name: str) -> dict[str, str]:
    """sha256 of every tensor file of a run's newest checkpoint: weights, masters, moments, averages."""
    files = open_checkpoint(run_dir(config, name)).manifest.files
    return {file: entry.sha256 for file, entry in files.items()}


def events(config: str, name: str, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    lines = (run_dir(config, name) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def records(config: str, name: str) -> list[dict[str, Any]]:
    """The records of all steps."""
    return [json.loads(line) for line in (run_dir(config, name) / "metrics.jsonl").read_text().splitlines()]


def run_dir(config: str, name: str) -> Path:
    return Path(config).parent / "runs" / name
