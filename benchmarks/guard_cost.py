"""What the guards over state cost: steps with and without them in turn, and each part by itself.

    python -m torch.distributed.run --nproc_per_node 4 benchmarks/guard_cost.py configs/run/quickstart.yaml
    python benchmarks/guard_cost.py CONFIG layout.pp=1 ...          # one process

Both kinds of step do the same arithmetic; every other one takes no digests. Medians, and the difference
within pairs, for what else a machine does meanwhile moves both. Prints one line of JSON on rank 0.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from moe_runtime.open_run import open_run
from moe_runtime.config.load import load_config
from moe_runtime.config.reliability import GuardConfig
from moe_runtime.parallel.replica_digest import replica_differences
from moe_runtime.parallel.world import join_world, read_world
from moe_runtime.train.guard.integrity import Integrity
from moe_runtime.train.loop import Run

PAIRS = 8
REPEATS = 20


def timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def step_pairs(run: Run) -> list[tuple[float, float]]:
    """(seconds with, seconds without) of neighbouring steps, each kind first in half of the pairs."""
    optimizer = run.state.optimizer
    guards = {
        True: run.step.integrity,
        False: Integrity(GuardConfig(digest_every=0), run.runtime, optimizer, run.recorder.tell),
    }
    pairs = []
    for pair in range(PAIRS + 1):
        seconds = {}
        for place in range(2):
            is_guarded = (pair + place) % 2 == 0
            run.step.integrity = guards[is_guarded]
            run.step.integrity.take()  # not timed: the step before may not have taken any
            run.state.peers.barrier()
            seconds[is_guarded] = timed(lambda pair=pair, place=place: run.step(2 * pair + place))
        pairs.append((seconds[True], seconds[False]))
    run.step.integrity = guards[True]
    return pairs[1:]  # the first pair compiles and allocates


def parts(run: Run) -> dict[str, float]:
    """Median seconds of what a guarded step adds, and of one comparison of replicas."""
    at_rest, peers = run.step.integrity._at_rest, run.state.peers
    actions = {
        "take_s": at_rest.take,
        "check_s": at_rest.changes,
        "agree_s": lambda: peers.any_true(False),
        "compare_s": lambda: replica_differences(run.runtime, run.state.optimizer),
    }
    found = {}
    for name, action in actions.items():
        peers.barrier()
        found[name] = median(timed(action) for _ in range(REPEATS))
    return found


def main(config: str, *overrides: str) -> None:
    folder = Path(tempfile.gettempdir()) / f"guard_cost_{os.getppid()}"  # the launcher's: alike on all ranks
    try:
        own = (f"out_dir={folder}", "metrics.wandb=off", "metrics.trace_step=null", "train.total_steps=100")
        loaded = load_config(config, (*overrides, *own))
        world = read_world(loaded.device)
        with join_world(world, loaded.train.peer_timeout_s):
            run = open_run(loaded, world, fresh=True)
            pairs, found = step_pairs(run), parts(run)
            without = median(pair[1] for pair in pairs)
            result = {
                "config": config,
                "overrides": overrides,
                "ranks": world.world_size,
                "state_bytes": sum(held.tensor.nbytes for held in run.step.integrity._at_rest._held()),
                "step_s": without,
                "guarded_step_s": median(pair[0] for pair in pairs),
                "paired_difference": median(a - b for a, b in pairs) / without,
                **found,
                "parts_of_a_step": sum(found[key] for key in ("take_s", "check_s", "agree_s")) / without,
                "compare_of_a_step": found["compare_s"] / without,
            }
            if world.rank == 0:
                print(json.dumps(result))
            run.state.peers.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
