"""BF16 of ours against transformers' DeepseekV3ForCausalLM on one GPU, in turn, the same weights and tokens.

Fewer experts than the slice of FP8 against BF16, since both models are in memory. As on the CPU, both have
torch's fused AdamW on BF16 weights.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_slice.shapes import slice_config
from moe_runtime.cli.bench_slice.subject import draw_weights
from moe_runtime.cli.bench_train import copy_weights, open_peer, our_step, peer_step
from moe_runtime.model.transformer import Transformer

EXPERTS, VOCAB, SEQ_LEN = 16, 16384, 4096


def measure_peer(rounds: int) -> dict[str, Any]:
    """Tokens/s of both, the ratio over rounds and both losses of the first step; one sequence a step."""
    config, device = slice_config(EXPERTS, VOCAB), torch.device("cuda")
    model = Transformer(config, dtype=torch.bfloat16, device=device)
    draw_weights(model, config.init_std, seed=1)
    peer = open_peer(config, torch.bfloat16, device)
    copy_weights(model, peer)
    generator = torch.Generator(device).manual_seed(2)
    tokens = torch.randint(VOCAB, (1, SEQ_LEN + 1), device=device, generator=generator)
    sides = {
        "ours": (lambda: our_step(model, tokens), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)),
        "peer": (lambda: peer_step(peer, tokens), torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)),
    }
    losses = {name: _timed(*side)[1] for name, side in sides.items()}
    for side in sides.values():
        _timed(*side)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            times[name].append(_timed(*sides[name])[0])
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["peer"], strict=True)]
    return {
        "experts": EXPERTS,
        "tokens_per_s": {name: SEQ_LEN / statistics.median(found) for name, found in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "loss": losses,
        "rounds": rounds,
    }


def _timed(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds, loss) of forward, backward and AdamW."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    loss = step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.perf_counter() - begun, float(loss.detach())
