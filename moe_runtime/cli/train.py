"""`moe-runtime train`: one rank of a training run; the launcher starts as many as the layout needs."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_runtime.cli.launchers.environment import claim_rank
from moe_runtime.cli.orphan import stop_with_parent
from moe_runtime.cli.rank_output import read_ranks, tell_user, turn_to_file
from moe_runtime.cli.supervise.outcome import leave_stopped
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError, MemoryEnded, PeerLost
from moe_runtime.parallel.heartbeat import ATTEMPT, STATUS_DIR, Heartbeat
from moe_runtime.train.fault import Fault, read_faults, split_orders

if TYPE_CHECKING:
    from moe_runtime.metrics.console import ConsoleSink
    from moe_runtime.train.inject import Injector
    from moe_runtime.train.loop import Run


def train(
    config: Annotated[str, typer.Argument(help="run config, such as configs/run/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c ...")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget this run's checkpoints and records")] = False,
    inject: Annotated[
        list[str] | None,
        typer.Option(
            help="a fault to be made once, such as sigkill:rank1:step5:dispatch, or @FILE; repeatable"
        ),
    ] = None,
    wandb: Annotated[
        Literal["online", "offline", "off"] | None, typer.Option(help="the same as metrics.wandb=...")
    ] = None,
    log_ranks: Annotated[
        str | None,
        typer.Option(help="ranks whose output is shown too, besides their logs: all, or such as 1,4-7"),
    ] = None,
    local_rank: Annotated[int | None, typer.Option(help="set by the deepspeed launcher")] = None,
) -> None:
    """Train a model; the same command again resumes from the last good checkpoint."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    claim_rank()
    run = load_config(config, with_wandb(overrides, wandb))
    texts, orders = split_orders(inject or ())
    faults = read_faults(texts)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    shown = read_ranks(log_ranks, size)
    console = _open_console(run, rank, fresh, rank in shown)
    with _supervised(run.reliability.heartbeat_s) as heartbeat, closing(console):
        _train(run, fresh, faults, orders, heartbeat, console)


def with_wandb(overrides: list[str] | None, wandb: str | None) -> list[str]:
    """The overrides, and `--wandb` as one of them."""
    return [*(overrides or ()), *([] if wandb is None else [f"metrics.wandb={wandb}"])]


def _open_console(run: RunConfig, rank: int, fresh: bool, shown: bool) -> "ConsoleSink":
    """What shows the run; of the other ranks nobody sees it, for they speak into files."""
    # Imported here: pydantic and rich are enough for --help.
    from moe_runtime.metrics.console import open_console

    attempt = int(os.environ.get(ATTEMPT, "1"))
    if rank > 0:
        head = f"attempt {attempt}, process {os.getpid()}"
        run_dir, private = Path(run.out_dir) / run.name, run.reliability.private
        turn_to_file(run_dir, rank, head, private=private, fresh=fresh, shown=shown)
    console = open_console(run, attempt, quiet=rank > 0)
    console.starting("loading libraries")
    return console


def _train(
    run: RunConfig,
    fresh: bool,
    faults: list[Fault],
    orders: Path | None,
    heartbeat: Heartbeat | None,
    console: "ConsoleSink",
) -> None:
    """Train as one rank."""
    # Imported here: torch and DeepSpeed take seconds, and a wrong config should be told at once.
    from moe_comm.errors import CommError

    from moe_runtime.open_run import open_run
    from moe_runtime.parallel.world import join_world, read_world
    from moe_runtime.train import loop
    from moe_runtime.train.guard.spoil import spoil
    from moe_runtime.train.inject import Injector

    world = read_world(run.device)
    console.starting("joining the other ranks" if world.world_size > 1 else "")
    check_layout(run, world.world_size)
    injector = Injector(faults, world.rank, Path(run.out_dir) / run.name, fresh, orders)
    ready: Run | None = None
    with join_world(world, run.train.peer_timeout_s):
        try:
            injector.at("init")
            ready = open_run(run, world, fresh=fresh, console=console)
            ready.checkpoints.saver.store.at = partial(_writes, heartbeat, injector)
            if heartbeat is not None:
                heartbeat.follow(ready.runtime.clock.progress)
            injector.listen(ready.runtime.clock.progress, partial(spoil, ready.step))
            if not loop.train(ready):
                leave_stopped(world.rank)
        except (RuntimeError, MemoryError, CommError) as error:
            raise _explain(error, world.rank, ready) from error
    for text in injector.left():
        tell_user(f"rank {world.rank}: --inject {text}: never came to its place")


@contextmanager
def _supervised(heartbeat_s: float) -> Iterator[Heartbeat | None]:
    """Tell this rank's launcher how it goes, if it has one of ours."""
    folder = os.environ.get(STATUS_DIR)
    if folder is None:
        yield None
        return
    stop_with_parent()
    with Heartbeat(Path(folder), int(os.environ["RANK"]), heartbeat_s) as heartbeat:
        yield heartbeat


def _writes(heartbeat: Heartbeat | None, injector: "Injector", point: str) -> None:
    """A checkpoint that is written behind the training comes to a point; empty: it is done."""
    if heartbeat is not None:
        heartbeat.writes(point)
    if point:
        injector.at(f"save_{point}")


def _explain(error: Exception, rank: int, run: "Run | None") -> Exception:
    """A broken connection is a lost peer, too many rows a matter of the config; the rest stays as it is."""
    from moe_comm.errors import ReceiveOverflow

    from moe_runtime.train.memory_end import explain_memory_end, is_memory_end

    if is_memory_end(error):
        if run is None:
            return MemoryEnded(f"rank {rank}: memory ended before the first step: {_root(error)}")
        state, program = run.state, run.step.newest_program
        said = explain_memory_end(error, state.runtime, state.optimizer, program)
        return MemoryEnded(f"rank {rank}: {said}")
    root = _root(error)
    if isinstance(root, ReceiveOverflow):
        return ConfigError(f"layout.max_rows: {root} (layout.overflow=rounds)")
    text = str(root)
    signs = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out")
    if not any(sign in text.lower() for sign in signs):
        return error
    stamp = time.strftime("%H:%M:%S")
    print(f"{stamp} rank {rank}: {error}", file=sys.stderr, flush=True)
    return PeerLost(
        f"rank {rank}: lost a peer ({text.splitlines()[0][:160]}); look for the first rank that died, "
        "then run the same command again: it resumes from the last checkpoint"
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
