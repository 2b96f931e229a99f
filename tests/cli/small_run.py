"""A run small enough to be started, killed and resumed by tests, through the real launcher."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, **changes: object) -> Path:
    """A two-rank DualPipe run on a few hundred lines of text; gives the path of its config."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(24):
        lines = [f"def f{number}_{line}(x): return x * {line} + {number}" for line in range(40)]
        (text / f"{number}.py").write_text("\n".join(lines))
    config = {
        "bases": [str(ROOT / "configs/model/tiny.yaml")],
        "name": "small",
        "out_dir": str(folder / "runs"),
        "precision": "fp32",
        "device": "cpu",
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_size": 64, "expert_ffn_size": 32},
        "layout": {"pp": 2, "schedule": "dualpipe"},
        "batch": {"seq_len": 32, "global_batch_size": 4},
        "optim": {"moments": "fp8", "peak_lr": 1e-3, "numerics": {"every": 4}},
        "recipe": {"warmup_steps": 2},
        "data": {"path": str(folder / "data"), "source": f"dir:{text}"},
        "train": {
            "total_steps": 8,
            "eval_every": 4,
            "eval_sequences": 8,
            "checkpoint_every": 2,
            "keep_checkpoints": 3,
            "sample_tokens": 4,
            "ema_decay": 0.5,
            "log_every": 1,
            "peer_timeout_s": 60,
        },
        "metrics": {"wandb": "off", "heatmap_every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value  # type: ignore[index]
        else:
            config[section] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(*arguments: str) -> subprocess.Popen:
    """Start the launcher with a command."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "moe_runtime.cli.launch", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout_s: float = 120.0) -> tuple[int, str]:
    """Wait for the end; gives the exit code and everything that was said."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def run(*arguments: str) -> tuple[int, str]:
    """Start a command and wait for its end."""
    return finish(start(*arguments))


def steps_done(run_dir: Path) -> list[int]:
    """Steps that metrics.jsonl has."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout_s: float = 90.0) -> None:
    """Wait until a running run has done `step`."""
    deadline = time.monotonic() + timeout_s
    while not any(done >= step for done in steps_done(run_dir)):
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def wait_for_checkpoint(run_dir: Path, process: subprocess.Popen, timeout_s: float = 90.0) -> None:
    """Wait until a running run has a checkpoint on disk."""
    deadline = time.monotonic() + timeout_s
    while not list((run_dir / "checkpoints").glob("step_*")):
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


def digests(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of every tensor file of a checkpoint."""
    manifest = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}
