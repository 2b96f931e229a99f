"""What checkpoints cost a run: windows of ten steps with a checkpoint and without, in turn, in one world.

    PYTHONPATH=.:comm torchrun --standalone --nproc-per-node 4 \\
        benchmarks/checkpoint_cost.py configs/run/quickstart.yaml [--pairs 9] [a.b=c ...]

A larger model: `model.hidden_size=512 model.ffn_size=2048 model.expert_ffn_size=512 model.num_experts=16`.

A window with a checkpoint begins with one and ends when it is on disk and the ten steps are done, so a write
that takes longer than ten steps counts as it would in a run. Of each pair either window comes first half of
the time. `blocked_s` is the longest of all ranks; a window is timed by rank 0 between two barriers. Processor
time is of all ranks together: where ranks share cores, it is what writing takes from the training, and other
work on the machine hardly changes it. Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from moe_runtime.open_run import open_run
from moe_runtime.checkpoint.store import Saved
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.parallel.world import join_world, read_world
from moe_runtime.train.loop import Run

_EVERY = 10
_WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--pairs", type=int, default=9)
    told = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"checkpoint_cost_{os.getppid()}"  # the launcher's: of all ranks
    config = load_config(told.config, [*told.overrides, f"out_dir={folder}", "metrics.wandb=off"])
    world = read_world(config.device)
    check_layout(config, world.world_size)
    with join_world(world, config.train.peer_timeout_s):
        run = open_run(config, world, fresh=True)
        found = _measure(run, told.pairs)
        run.recorder.close()
    if world.rank == 0:
        shutil.rmtree(folder)
        print(json.dumps(found, indent=1))


def _measure(run: Run, pairs: int) -> dict[str, float]:
    step = 0
    for _ in range(_WARM_UP_STEPS):
        run.step(step)
        step += 1
    times: dict[bool, list[float]] = {True: [], False: []}
    work: dict[bool, list[float]] = {True: [], False: []}
    reports = []
    for pair in range(pairs + 1):
        for saves in (True, False) if pair % 2 else (False, True):
            seconds, work_s, report = _window(run, step, saves)
            step += _EVERY
            if pair > 0:  # the first makes the buffers
                times[saves].append(seconds)
                work[saves].append(work_s)
                reports.extend([report] if report else [])
    step_s = median(times[False]) / _EVERY
    blocked_s = median(blocked for blocked, _, _ in reports)
    return {
        "pairs": pairs,
        "megabytes": reports[0][2] / 1e6,
        "step_s": step_s,
        "blocked_s": blocked_s,
        "blocked_of_a_step": blocked_s / step_s,
        "write_s": median(write for _, write, _ in reports),
        "longer": median(times[True]) / median(times[False]) - 1,
        "longer_by_pair": median(a / b - 1 for a, b in zip(times[True], times[False], strict=True)),
        "noise": _spread(times[False]),
        "more_processor_time": median(work[True]) / median(work[False]) - 1,
        "processor_noise": _spread(work[False]),
    }


def _window(run: Run, step: int, saves: bool) -> tuple[float, float, tuple[float, float, int] | None]:
    """(seconds of ten steps, processor seconds, (seconds blocked, of writing, bytes) of the checkpoint)."""
    saver, report = run.checkpoints.saver, None
    run.state.peers.barrier()
    begun, worked = time.perf_counter(), time.process_time()
    if saves:
        run.checkpoints.begin(step)
    for number in range(step, step + _EVERY):
        run.step(number)
        report = report or saver.take()
    report = report or saver.wait()
    run.state.peers.barrier()
    seconds = time.perf_counter() - begun
    work_s = sum(run.state.peers.gather_json(time.process_time() - worked))
    if report is None:
        return seconds, work_s, None
    assert isinstance(report.outcome, Saved), report.outcome
    return seconds, work_s, (report.blocked_s, report.write_s, report.outcome.num_bytes)


def _spread(times: list[float]) -> float:
    """Median deviation of windows that do the same, of their median."""
    middle = median(times)
    return median(abs(seconds - middle) for seconds in times) / middle


if __name__ == "__main__":
    main()
