"""Opens a run: builds its parts, takes up where its last checkpoint stands, and begins its records.

Whatever one rank finds wrong here, all ranks say alike.
"""

import time
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil

from moe_runtime.build import build_mesh, build_optimizer, build_runtime
from moe_runtime.checkpoint.background import BackgroundSaver
from moe_runtime.checkpoint.folder import CHECKPOINTS_DIR, list_steps
from moe_runtime.checkpoint.store import CheckpointStore
from moe_runtime.config.derive import total_steps
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import dump_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.alert_rules import rules_of
from moe_runtime.metrics.console import ConsoleSink, open_console
from moe_runtime.metrics.files import CONFIG_FILE
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.world import World
from moe_runtime.train.alerting import Alarm
from moe_runtime.train.checkpoints import RunCheckpoints
from moe_runtime.train.guard.guard import Guard
from moe_runtime.train.guard.integrity import Integrity
from moe_runtime.train.guard.roll_back import RollBack
from moe_runtime.train.guard.state import GuardState
from moe_runtime.train.loop import Run
from moe_runtime.train.open_data import RunData, open_data
from moe_runtime.train.preempted import take_marker
from moe_runtime.train.resume import begin_from, resume
from moe_runtime.train.run_lock import enter_run
from moe_runtime.train.same_config import check_same_config
from moe_runtime.train.saving import TrainingState, with_ema
from moe_runtime.train.step import TrainStep
from moe_runtime.train.told_data import mixture_facts, tell_data


def open_run(config: RunConfig, world: World, *, fresh: bool, console: ConsoleSink | None = None) -> Run:
    """Build everything and take up where the last checkpoint stands.

    Args:
        console: shows what is being done, on rank 0; None: nothing is shown before the first step.
    """
    shown = console or open_console(config, world.attempt, quiet=world.rank > 0)
    runtime, data = _open_parts(config, world, shown)
    peers = runtime.peers
    run_dir = Path(config.out_dir) / config.name
    said = _begin(config, runtime, run_dir, peers, fresh)
    optimizer = build_optimizer(runtime)
    lock = peers.alike(partial(_enter, run_dir, config, peers), (ConfigError,))
    guard_state = GuardState(config.guard.spike_window, config.data.skip, rules_of(config))
    parts = TrainingState(runtime, optimizer, peers, data.tokenizer, guard_state, loader=data.loader)
    state = with_ema(parts, config.train.ema_decay)
    store = _open_store(run_dir, config, peers)
    shown.starting("looking for a checkpoint")
    start, resumed = resume(store, state, fresh)
    said += [*_preempted(run_dir, peers), *resumed]
    opened = partial(_open_recorder, run_dir, config, peers, start, world.attempt, shown)
    recorder = peers.alike(opened, (ConfigError,))
    shown.starting("")
    if peers.is_first:
        runtime.clock.progress.listeners.append(shown.follow)
    recorder.begins(start, said)
    tell_data(recorder, mixture_facts(config, runtime.layout, data.loader, guard_state.skipped_data))
    integrity = Integrity(config.guard, runtime, optimizer, recorder.tell, state.ema is not None)
    integrity.take()
    checkpoints = RunCheckpoints(BackgroundSaver(store), state, recorder)
    step = TrainStep(runtime, optimizer, data.loader, state.guard, integrity, state.ema)
    return Run(
        config,
        state,
        step,
        data,
        checkpoints,
        recorder,
        Guard(config, state.guard, recorder.tell),
        Alarm(guard_state.alerts, peers, recorder, step.recorder.starved_experts),
        RollBack(checkpoints, state, integrity, recorder),
        start,
        total_steps(config, runtime.layout),
        lock,
    )


def _enter(run_dir: Path, config: RunConfig, peers: Peers) -> TextIO | None:
    """Keep other processes out of the run folder, on rank 0."""
    return enter_run(run_dir, config.reliability.private) if peers.is_first else None


def _open_store(run_dir: Path, config: RunConfig, peers: Peers) -> CheckpointStore:
    writers = peers.over_group_of_their_own(config.reliability.limits.save)
    return CheckpointStore(run_dir, writers, config.train.keep_checkpoints)


def _preempted(run_dir: Path, peers: Peers) -> list[str]:
    """What rank 0 says where a scheduler had stopped this run."""
    said = take_marker(run_dir) if peers.is_first else None
    return [said] if said else []


def _open_parts(config: RunConfig, world: World, shown: ConsoleSink) -> tuple[Runtime, RunData]:
    """This rank's part of the model, and the data."""
    layout = check_layout(config, world.world_size)
    mesh = build_mesh(layout, world.rank)
    groups = open_groups(mesh, config.train.peer_timeout_s)
    peers = Peers(world.rank, world.world_size, groups.control)
    check_same_config(config, peers)
    shown.starting("opening data")
    data = open_data(config, peers, shown.preparing)
    shown.starting("building the model")
    runtime = build_runtime(
        config,
        layout,
        mesh,
        groups,
        world.device,
        ranks_per_node=world.ranks_per_node,
        document_separator=data.tokenizer.eos_id if config.data.document_mask else None,
    )
    return runtime, data


def _begin(config: RunConfig, runtime: Runtime, run_dir: Path, peers: Peers, fresh: bool) -> list[str]:
    """Give a new run the weights of `train.init_from`, whose copies the optimizer then makes its masters."""
    path = config.train.init_from
    if path is None or peers.first_says(not fresh and bool(list_steps(run_dir / CHECKPOINTS_DIR))):
        return []
    mesh = runtime.mesh
    first_expert = mesh.ep_rank * (config.model.num_experts // mesh.ep)
    return [begin_from(path, runtime, first_expert, peers)]


def _open_recorder(
    run_dir: Path, config: RunConfig, peers: Peers, start: int, attempt: int, console: ConsoleSink
) -> Recorder:
    """Begin the records: not before data was opened and a checkpoint of another model refused."""
    try:
        if peers.is_first:
            (run_dir / CONFIG_FILE).write_text(dump_config(config))
        lived_s = time.time() - psutil.Process().create_time()
        return Recorder(run_dir, config, peers, start, console, attempt, lived_s)
    except OSError as error:
        where = error.filename or run_dir
        raise ConfigError(f"{where}: cannot be written ({error.strerror}); choose another name") from error
