"""A run folder that was told everything a run can tell, by our own writers and without a model."""

import io
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from moe_runtime.config.schema import RunConfig
from moe_runtime.metrics.console import ConsoleSink
from moe_runtime.metrics.files import CONFIG_FILE, TRACE_FILE
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.peers import Peers
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import Trace, write_trace
from moe_runtime.schedule import build
from tests.unit.checkpoint.models import CONFIG
from tests.unit.planner.synthetic import trace_of

STEPS, TRACED, DEAD = 12, 3, 2  # DEAD: the expert that has no token
ALERTS_AT = {8: "expert 2", 9: "expert 2 still"}  # the first is to be told to people
HOSTILE = "<script>alert(1)</script>\x1b[2J | ünïcode\n    indented"


def config(wandb: str = "offline") -> RunConfig:
    changes = {
        "metrics": {"wandb": wandb, "heatmap_every": 2, "wandb_project": "told"},
        "train": {"total_steps": STEPS},
    }
    return RunConfig.model_validate(CONFIG.model_dump() | changes)


def record(step: int) -> dict[str, Any]:
    """Numbers whose digits would show any rounding on the way."""
    spread = {"min": 0.1 / step, "p50": 1 / 3 / step, "max": 2 / 3 / step}
    return {
        "step": step,
        "tokens": step * (2**53 // 16),  # whole numbers that single precision does not hold
        "loss": math.nan if step == 5 else math.pi / step,
        "lr": 1e-17 * step,
        "skipped": step == 5,
        "comm_bytes_inter": 2**40 + step,
        "routing": {"violation": spread},
        "worst_layer": "layers.1",
        "val_sets": {"books": {"val_bpb": 1 / 7 / step}} if step % 4 == 0 else None,
        "layers": {"layers.1": {"violation": 0.1 + step}},
    }


def told_run(run_dir: Path, wandb: str = "offline") -> Path:
    """Tell everything, and close; gives the folder."""
    run = config(wandb)
    run_dir.mkdir(parents=True)
    (run_dir / CONFIG_FILE).write_text(yaml.safe_dump(run.model_dump(mode="json")))
    console = ConsoleSink(STEPS, None, 1, Console(file=io.StringIO()))
    recorder = Recorder(run_dir, run, Peers(), 0, console)
    for step in range(1, STEPS + 1):
        recorder.step(record(step))
        if step % 2 == 0:
            recorder.expert_load(step, load(run))
        if step == TRACED:
            write_trace(trace(), run_dir / TRACE_FILE)
            recorder.timeline(trace())
        if step % 5 == 0:
            recorder.sample(step, f"{HOSTILE} {step}")
        if step in ALERTS_AT:
            fields = alert(step)
            recorder.alert(step, f"{ALERTS_AT[step]} is dead", fields["action"], fields)
    recorder.close()
    return run_dir


def alert(step: int) -> dict[str, Any]:
    """What an alert has besides its step and message."""
    fields = {"metric": "routing/dead_experts/max", "value": 1.0, "threshold": 0.0, "last": [[step, 1.0]]}
    return {"alert": "dead_expert", "action": ["wandb" if step == 8 else "log"], **fields}


def load(run: RunConfig) -> torch.Tensor:
    """Loads [layers, experts] with one dead expert."""
    layers = run.model.num_layers - run.model.num_dense_layers + run.model.mtp_depth
    experts = run.model.num_experts
    table = torch.full((layers, experts), experts / (experts - 1), dtype=torch.float64)
    table[:, DEAD] = 0.0
    return table


def trace() -> Trace:
    """The simulated step of a small program, as if it had been measured."""
    program = build("1f1b", 2, 2)
    costs = Costs((StageCosts(1.0, 1.0, 1.0),) * 2)
    return trace_of(simulate(program, costs), program)
