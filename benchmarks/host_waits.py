"""Times that the host waits for the GPU within the phases of a step's blocks.

    PYTHONPATH=.:comm python benchmarks/host_waits.py configs/run/small.yaml [a.b=c ...]

One process takes forwards and backwards of the config's model on random tokens as its program says, once to
warm up and once under torch's `set_sync_debug_mode`, which reports each call that waits. Prints one JSON
object: for each phase how often it ran and how often it waited, and from which line. Counting the rows of
each expert (`dispatch`) has to wait: the host cannot size the experts' buffers before.

Exit codes: 0; 1 where another phase waited; 2 without a CUDA device.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_runtime.build import build_mesh, build_optimizer, build_runtime
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.world import join_world, read_world
from moe_runtime.train.step import objective_weights, split_microbatches

COUNTING = "dispatch"


@contextmanager
def waits_of(runtime: Runtime, found: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count calls that wait, by (phase without its layer, file:line)."""

    def note(message: object, category: type, filename: str, lineno: int, *_: object) -> None:
        if "synchroniz" in str(message):
            place = "/".join(filename.split("/")[-3:]) + f":{lineno}"
            found[runtime.clock.progress.part.split(" ")[0], place] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measure(config: RunConfig, microbatches: int, steps: int) -> dict[str, object]:
    """Everything, within a world of one process."""
    world = read_world(config.device)
    layout = check_layout(config, world.world_size)
    mesh = build_mesh(layout, 0)
    runtime = build_runtime(config, layout, mesh, open_groups(mesh), world.device, ranks_per_node=1)
    optimizer = build_optimizer(runtime)
    program = runtime.program(microbatches)
    length = config.batch.seq_len + 1 + config.model.mtp_depth
    shape = (microbatches * config.batch.micro_batch_size, length)
    tokens = torch.randint(config.model.vocab_size, shape, device=world.device)
    batch = split_microbatches(tokens, config.batch.micro_batch_size, program.num_directions)
    weights = objective_weights(runtime, microbatches, 0.3)

    def step() -> float:
        begun = time.perf_counter()
        scalars = runtime.executor.run(program, batch, weights, optimizer.end_microbatch)
        optimizer.step(1e-4)
        torch.cuda.synchronize()
        assert scalars.totals
        return time.perf_counter() - begun

    seconds = [step() for _ in range(steps)]
    found: Counter[tuple[str, str]] = Counter()
    runtime.clock.restart(keep_spans=True)
    with waits_of(runtime, found):
        runtime.executor.run(program, batch, weights, optimizer.end_microbatch)
    ran = Counter(name.split(" ")[0] for lane, name, _, _ in runtime.clock.spans or () if lane == "phase")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "microbatches": microbatches,
        "tokens": shape[0] * config.batch.seq_len,
        "step_s": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "phases": {name: {"ran": count, "waits": 0} for name, count in sorted(ran.items())}
        | {
            name: {
                "ran": ran[name],
                "waits": sum(n for (phase, _), n in found.items() if phase == name),
                "from": {place: n for (phase, place), n in found.items() if phase == name},
            }
            for name in sorted({phase for phase, _ in found} & set(ran))
        },
        "outside_of_phases": {place: n for (phase, place), n in found.items() if phase not in ran},
    }


def main(arguments: list[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="before the counted one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("host_waits: expected a CUDA device, found none; run it where there is a GPU", file=sys.stderr)
        return 2
    config = load_config(options.config, ["device=cuda", *options.overrides])
    with join_world(read_world("cuda"), 60.0):
        result = measure(config, options.microbatches, options.steps)
    print(json.dumps(result))
    waiting = {name for name, phase in result["phases"].items() if phase["waits"]}  # type: ignore[attr-defined]
    return 1 if waiting - {COUNTING} else 0


if __name__ == "__main__":
    sys.exit(main())
