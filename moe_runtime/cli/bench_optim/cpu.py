"""The whole `step()` on the CPU: ours in three storages against DeepSpeed, torch, torchao and bitsandbytes.

All step one flat FP32 parameter of their own with the same random gradient, in turn, the order rotating
from round to round; the figure is the median over rounds of their time over ours with FP8 moments, and
beside it the ratio of the fastest steps, which other work on the machine bears upon least. What takes
seconds is timed in every fifth round only. Each number of threads has a process of its own, since some
peers read OMP_NUM_THREADS when they are loaded. Peers that cannot be imported or fail are listed with the
reason.

    python -m moe_runtime.cli.bench_optim.cpu ELEMENTS ROUNDS THREADS      prints one JSON object
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_optim.deepspeed_peer import open_cpu_adam
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.optim.adamw import AdamW

OURS = "ours, fp8"
LR, WEIGHT_DECAY = 1e-3, 0.1
SLOW_SECONDS, SLOW_TURNS = 1.0, 5
Optimizer = torch.optim.Optimizer
_SETTINGS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": WEIGHT_DECAY}


def _ours(kind: str, path: str = "auto") -> Callable[[Tensor], Optimizer]:
    return lambda param: AdamW([param], **_SETTINGS, moments=kind, step_path=path)


def _torchao(name: str) -> Callable[[Tensor], Optimizer]:
    def open_it(param: Tensor) -> Optimizer:
        import torchao.optim

        optimizer: Optimizer = getattr(torchao.optim, name)([param], **_SETTINGS)
        return optimizer

    return open_it


def _bitsandbytes(param: Tensor) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit([param], **_SETTINGS)
    return optimizer


CONTENDERS: dict[str, Callable[[Tensor], Optimizer]] = {
    OURS: _ours("fp8"),
    "ours, bf16": _ours("bf16"),
    "ours, fp32 (torch's kernel)": _ours("fp32"),
    "DeepSpeedCPUAdam, fp32": lambda param: open_cpu_adam(param, LR, WEIGHT_DECAY),
    "torch AdamW fused, fp32": lambda param: torch.optim.AdamW([param], **_SETTINGS, fused=True),
    "torchao AdamW8bit, compiled": _torchao("AdamW8bit"),
    "torchao AdamWFp8, compiled": _torchao("AdamWFp8"),
    "torchao AdamW8bit, eager": _torchao("AdamW8bit"),
    "torchao AdamWFp8, eager": _torchao("AdamWFp8"),
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "ours, fp8, eager": _ours("fp8", "eager"),
}


@contextlib.contextmanager
def _stance(name: str) -> Iterator[None]:
    """torchao compiles its step; for the rows called eager it is told not to."""
    if "eager" in name and "torchao" in name:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _timed(name: str, optimizer: Optimizer) -> float:
    with _stance(name):
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start


def _open_all(elements: int) -> tuple[dict[str, Optimizer], dict[str, str], set[str]]:
    """Optimizers that took two steps, why the others did not, and which are slow."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(elements, generator=generator)
    grad = torch.randn(elements, generator=generator) * 1e-3
    ready: dict[str, Optimizer] = {}
    missing: dict[str, str] = {}
    slow: set[str] = set()
    for name, open_it in CONTENDERS.items():
        param = torch.nn.Parameter(value.clone())
        param.grad = grad  # of all: a step reads it only
        try:
            optimizer = open_it(param)
            _timed(name, optimizer)
            if _timed(name, optimizer) > SLOW_SECONDS:
                slow.add(name)
        except Exception as error:  # a peer may fail in any way, and is then not measured
            lines = str(error).strip().splitlines() or [""]
            missing[name] = f"{type(error).__name__}: {lines[0]}"[:200]
        else:
            ready[name] = optimizer
    return ready, missing, slow


def time_here(elements: int, rounds: int) -> dict[str, Any]:
    """Time all contenders in this process, with the threads it has.

    Returns:
        elements, threads, `rows` {name: {ms, ratio, low, high, best}}, where ratio is their time over ours in
        FP8 (median, extremes) and best that of the fastest steps, and `missing` {name: reason}.
    """
    optimizers, missing, slow = _open_all(elements)
    turns: list[dict[str, float]] = []
    for turn in range(rounds):
        names = [name for name in optimizers if turn % SLOW_TURNS == 0 or name not in slow]
        shift = turn % len(names)
        turns.append({name: _timed(name, optimizers[name]) for name in names[shift:] + names[:shift]})
    fastest = min(turn[OURS] for turn in turns)
    rows = {}
    for name in optimizers:
        seconds = [turn[name] for turn in turns if name in turn]
        ratios = [turn[name] / turn[OURS] for turn in turns if name in turn]
        rows[name] = {
            "ms": statistics.median(seconds) * 1e3,
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "best": min(seconds) / fastest,
        }
    return {"elements": elements, "threads": torch.get_num_threads(), "rows": rows, "missing": missing}


def measure(sizes: list[int], threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """`time_here` for every size and number of threads, each in a process of its own.

    Raises:
        MoeRuntimeError: such a process failed.
    """
    results = []
    for count in threads:
        for elements in sizes:
            command = [sys.executable, "-W", "ignore", "-m", __name__, str(elements), str(rounds), str(count)]
            environment = os.environ | {"OMP_NUM_THREADS": str(count)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise MoeRuntimeError(f"bench optim: the measuring process ended with {last}")
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return results


def describe(results: list[dict[str, Any]]) -> str:
    """The measurement as tables."""
    lines = ["AdamW step on the CPU; ratio: time over ours with FP8 moments, median (range), fastest"]
    for result in results:
        lines.append(f"\n{result['elements']:,} elements, {result['threads']} thread(s)")
        lines += [
            f"{name:30}{row['ms']:10.1f} ms{row['ratio']:9.2f}x  ({row['low']:.2f} to {row['high']:.2f})"
            f"{row['best']:9.2f}x"
            for name, row in result["rows"].items()
        ]
        lines += [f"{name:30}missing: {reason}" for name, reason in result["missing"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    size, turns, num_threads = (int(argument) for argument in sys.argv[1:])
    torch.set_num_threads(num_threads)
    print(json.dumps(time_here(size, turns)))
