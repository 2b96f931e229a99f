"""BF16 of ours against transformers' DeepseekV3ForCausalLM on one GPU, in turn, the same weights and tokens.

Fewer experts than the slice of FP8 against BF16, since both models are in memory. As on the CPU, both have
torch's fused AdamW on BF16 weights. The peer runs as it comes, and, if asked for, under `torch.compile` too.
"""

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_slice.peaks import measure_peaks
from moe_runtime.cli.bench_slice.shapes import operations, slice_config
from moe_runtime.cli.bench_slice.subject import draw_weights
from moe_runtime.cli.bench_train import copy_weights, open_peer, our_step, peer_step
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import ConfigError
from moe_runtime.model.transformer import Transformer

EXPERTS, VOCAB, SEQ_LEN = 16, 16384, 4096
Side = tuple[Callable[[], Tensor], torch.optim.Optimizer]


def measure_peer(rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Both on the GPU; one sequence a step.

    Args:
        rounds: turns of each side.
        compiled: the peer under `torch.compile` as a third side.

    Raises:
        ConfigError: no GPU, or transformers is not installed.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench train: expected a CUDA device for --device cuda, got none; use --device cpu")
    peaks = measure_peaks()
    torch.cuda.empty_cache()
    config = slice_config(EXPERTS, VOCAB)
    found = compare(config, torch.device("cuda"), SEQ_LEN, rounds, compiled)
    work = operations(config, 1, SEQ_LEN)
    shares = {
        name: work.seconds("causal", peaks["bf16"]) * speed / SEQ_LEN
        for name, speed in found["tokens_per_s"].items()
    }
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return device | found | {"peaks": peaks, "mfu_causal": shares, "experts": EXPERTS}


def compare(
    config: ModelConfig, device: torch.device, seq_len: int, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Tokens/s of each side, the ratios over rounds and both models' losses at the same weights."""
    sides = _open_sides(config, device, seq_len, compiled)
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, side in list(sides.items()):
        try:
            loss = _timed(*side)[1]
            if name != "compiled":  # whose weights the peer has moved
                losses[name] = loss
            _timed(*side)
        except Exception:
            if name != "compiled":
                raise
            failed[name] = traceback.format_exc(limit=-3)
            del sides[name]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            times[name].append(_timed(*sides[name])[0])
    return {
        "tokens_per_s": {name: seq_len / statistics.median(taken) for name, taken in times.items()},
        "ratio": {name: _ratios(times[name], times["ours"]) for name in sides if name != "ours"},
        "loss": losses,
        "failed": failed,
        "rounds": rounds,
    }


def _ratios(theirs: list[float], ours: list[float]) -> dict[str, float]:
    each = [them / us for them, us in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def _open_sides(config: ModelConfig, device: torch.device, seq_len: int, compiled: bool) -> dict[str, Side]:
    """What takes a step of each side; all with the same weights and tokens."""
    model = Transformer(config, dtype=torch.bfloat16, device=device)
    draw_weights(model, config.init_std, seed=1)
    peer = open_peer(config, torch.bfloat16, device)
    copy_weights(model, peer)
    generator = torch.Generator(device).manual_seed(2)
    tokens = torch.randint(config.vocab_size, (1, seq_len + 1), device=device, generator=generator)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    theirs = torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)
    sides: dict[str, Side] = {
        "ours": (lambda: our_step(model, tokens), ours),
        "peer": (lambda: peer_step(peer, tokens), theirs),
    }
    if compiled:
        faster = torch.compile(peer)
        sides["compiled"] = (lambda: peer_step(faster, tokens), theirs)  # type: ignore[arg-type]
    return sides


def _timed(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds, loss) of forward, backward and AdamW."""
    _wait_for_device()
    begun = time.perf_counter()
    loss = step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait_for_device()
    return time.perf_counter() - begun, float(loss.detach())


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_peer(peer: dict[str, Any]) -> str:
    """What `measure_peer` found, for people."""
    lines = [
        f"BF16 on {peer['device']} (torch {peer['torch']}) against transformers: a slice of "
        f"DeepSeek-V3 of true widths with {peer['experts']} experts, a step of one sequence "
        f"of {SEQ_LEN} tokens, {peer['rounds']} rounds",
        f"{'':10}{'tokens/s':>10}{'MFU':>8}{'loss of the first step':>25}",
    ]
    for name, speed in peer["tokens_per_s"].items():
        loss = f"{peer['loss'][name]:25.5f}" if name in peer["loss"] else ""
        lines.append(f"{name:10}{speed:10.0f}{peer['mfu_causal'][name]:8.1%}{loss}")
    for name, ratio in peer["ratio"].items():
        lines.append(f"ours over {name}: {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})")
    lines += [f"{name} failed and is left out:\n{error}" for name, error in peer["failed"].items()]
    return "\n".join(lines)
