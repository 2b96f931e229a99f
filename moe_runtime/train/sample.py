"""Continues a prompt with the model as it lies over the ranks, in any layout.

Every lane runs the same forward over the pipeline (an expert-parallel group needs all its ranks), the
last stage draws the next token and tells all. No cache of keys: a sample now and then is short, and
the weights are where they are.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.generate.sampling import sample_token
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.schedule.forward_only import forward_only

TEMPERATURE, TOP_P = 0.8, 0.95


def sample_tokens(runtime: Runtime, prompt: list[int], count: int, seed: int) -> list[int]:
    """Draw `count` tokens after `prompt`; a collective call, alike on every rank.

    Args:
        prompt: at least one token; only the last seq_len tokens are looked at.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    program = forward_only(runtime.layout.placement[:1], 1)  # a second direction would do the same again
    window, tokens = runtime.config.batch.seq_len, list(prompt)
    for _ in range(count):
        inputs = _as_input(runtime, tokens[-window:])
        kept = runtime.sampler.run(program, [[inputs]], None, keep="hidden").kept
        tokens.append(_draw(runtime, kept.get((0, 0)), generator))
    return tokens[len(prompt) :]


def _as_input(runtime: Runtime, tokens: list[int]) -> Tensor:
    """[1, tokens + 1 + mtp_depth]: what stands after the sequence is cut off before anyone reads it."""
    padding = [0] * (1 + runtime.config.model.mtp_depth)
    return torch.tensor([tokens + padding], device=runtime.device)


def _draw(runtime: Runtime, hidden: Tensor | None, generator: torch.Generator) -> int:
    drawn = torch.zeros(1, dtype=torch.int64)
    last = runtime.layout.num_stages - 1
    first_lane_last_stage = runtime.mesh.dp * runtime.layout.placement[0][last]
    if runtime.mesh.rank == first_lane_last_stage:
        assert hidden is not None, "the last stage of direction 0 kept nothing"
        head = runtime.chunks[last].head.weight
        with torch.no_grad():
            logits = torch.nn.functional.linear(hidden[0, -1], head)
        drawn[0] = sample_token(logits.cpu(), TEMPERATURE, TOP_P, generator)
    if runtime.mesh.world_size > 1:
        dist.broadcast(drawn, first_lane_last_stage, group=runtime.groups.control)
    return int(drawn)
