"""A run folder of any length with everything that a run may record, written by the runtime's own writers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.metrics.files import EVENTS_FILE, METRICS_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE, HeatmapWriter, is_due
from moe_runtime.metrics.line import to_line
from moe_runtime.metrics.record import LAYER_KEYS, METRICS
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import write_trace
from moe_runtime.schedule import build
from tests.unit.planner.synthetic import trace_of

_CLASSES = ("router", "experts", "attention")
_STARS = {
    "val_sets": ("stdlib", "prose"),
    "optim_numerics": ("dense", "experts"),
    "fp8": ("input", "weight", "gradient"),
    "grad_norms": _CLASSES,
    "updates": _CLASSES,
}
_OF_EVALUATIONS = ("val_loss", "val_bpb", "val_sets")
_WHOLE = ("tokens", "skipped_steps", "batch_size", "restarts", "lost_steps", "verified_step")


def make_run(
    folder: Path,
    steps: int = 40,
    layers: int = 3,
    experts: int = 8,
    layers_every: int = 1,
    heatmap_every: int = 1,
    dead: tuple[int, int, int] | None = None,
) -> Path:
    """Write metrics.jsonl, events.jsonl, expert_load.jsonl and trace.json; gives the folder.

    Args:
        dead: layer, expert and the step from which on that expert gets nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [f"layers.{layer}" for layer in range(1, layers + 1)]
    with (folder / METRICS_FILE).open("w") as file:
        for record in records(steps, prefixes, layers_every):
            file.write(json.dumps(to_line(record)) + "\n")
    _write_loads(folder, steps, prefixes, experts, heatmap_every, dead)
    with (folder / EVENTS_FILE).open("w") as file:
        for event in events(steps):
            file.write(json.dumps(event) + "\n")
    program = build("dualpipe", 4, 8)
    costs = Costs(tuple(StageCosts(0.010, 0.011, 0.009, 0.002, 0.002) for _ in range(program.num_stages)))
    write_trace(trace_of(simulate(program, costs), program), folder / "trace.json")
    return folder


def records(steps: int, prefixes: Sequence[str], layers_every: int) -> Iterator[dict[str, Any]]:
    """Records with every key that `METRICS` knows; the loss falls, everything else wanders."""
    random = np.random.default_rng(7)
    paths = [path for path in _paths() if path not in ("step", "worst_layer", "skipped")]
    for step in range(1, steps + 1):
        values = random.random(len(paths))
        record: dict[str, Any] = {"step": step, "skipped": False, "worst_layer": prefixes[-1]}
        for path, value in zip(paths, values.tolist(), strict=True):
            head = path.split("/")[0]
            if head not in _OF_EVALUATIONS or step % 20 == 0:
                _put(record, path, int(value * 1e6) if head in _WHOLE else value)
        record |= {"tokens": step * 8192, "loss": 2 + 3 / (1 + step / 10) + 0.1 * float(values[0])}
        if step % layers_every == 0:
            numbers = random.random((len(prefixes), len(LAYER_KEYS))).tolist()
            record["layers"] = {
                prefix: dict(zip(LAYER_KEYS, row, strict=True))
                for prefix, row in zip(prefixes, numbers, strict=True)
            }
        yield record


def events(steps: int) -> Iterator[dict[str, Any]]:
    """What happens to a run: samples, checkpoints, a spike, an alert, a restart, an end."""
    told: dict[int, list[dict[str, Any]]] = {}
    for step in range(10, steps + 1, max(10, steps // 50)):
        told.setdefault(step, []).append(
            {"kind": "checkpoint", "step": step, "bytes": 26145681, "blocked_s": 0.01}
        )
        told[step].append(
            {"kind": "sample", "step": step, "text": f"def step_{step}(x):\n    return x < {step}"}
        )
    half = max(1, steps // 2)
    last = [[step, 0.5] for step in range(max(1, half - 19), half + 1)]
    alert = {
        "kind": "alert",
        "alert": "dead_expert",
        "metric": "routing/dead_experts/max",
        "value": 1,
        "last": last,
    }
    told.setdefault(half, []).append({**alert, "step": half, "message": "1 expert of layers.1 is dead"})
    told[half].append({"kind": "attempt", "attempt": 2, "step": half - 1})
    told.setdefault(steps, []).append({"kind": "finished", "step": steps, "val_bpb": 1.5, "order1_bpb": 3.5})
    for step in sorted(told):
        for event in told[step]:
            yield {
                "time": f"2026-01-02T03:{step // 60 % 60:02d}:{step % 60:02d}.000+00:00",
                "attempt": 1,
                **event,
            }


def _paths() -> Iterator[str]:
    """Every path of a record but those of layers, a name for each star."""
    for path in METRICS:
        head, _, rest = path.partition("/")
        if head == "layers":
            continue
        if "*" in path:
            yield from (f"{head}/{name}/{rest.removeprefix('*/')}".rstrip("/*") for name in _STARS[head])
        else:
            yield path


def _put(record: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        record = record.setdefault(parent, {})
    record[name] = value


def _write_loads(
    folder: Path,
    steps: int,
    prefixes: Sequence[str],
    experts: int,
    every: int,
    dead: tuple[int, int, int] | None,
) -> None:
    random = np.random.default_rng(11)
    writer = HeatmapWriter(folder / HEATMAP_FILE, prefixes, every)
    for step in range(1, steps + 1):
        if is_due(step, every):
            load = random.gamma(8.0, 1 / 8.0, (len(prefixes), experts))
            if dead is not None and step >= dead[2]:
                load[dead[0], dead[1]] = 0.0
            assert writer.add(step, load) is None
    writer.close()
