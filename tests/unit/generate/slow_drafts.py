"""Drafts without a cache, by the phases that training runs over whole sequences: the oracle of `drafter.py`.

Tokens 0..L are known. The main model reads 0..L-1, and module d turns hidden states 0..L-1 of what comes
before it into its own, each joined with the token 1+d further on; the last of them drafts token L+1+d. Drafts
beyond the last module come of that module over one more position each, whose input is its own last output.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_runtime.generate.draws import Draws
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import filtered_probs, pick
from moe_runtime.model.phase import Phase
from moe_runtime.model.transformer import Transformer

# (position among the drafts, logits [vocab]) -> the drafted token.
Draw = Callable[[int, Tensor], int]


@torch.no_grad()
def slow_drafts(
    model: Transformer, tokens: Sequence[int], num_drafts: int, draw: Draw
) -> tuple[Tensor, list[int]]:
    """Drafts behind `tokens`: the logits [num_drafts, vocab] that they are drawn from, and what is drawn."""
    num_modules = model.config.mtp_depth
    seen, out = list(tokens), []
    hidden = joined = _run(model, _is_main, seen, len(tokens) - 1)
    for position in range(num_drafts):
        again = position >= num_modules
        joined = torch.cat((joined, hidden[:, -1:]), dim=1) if again else hidden
        name = f"mtp.{min(position, num_modules - 1)}"
        hidden = _run(model, partial(_is_of, name), seen, joined.shape[1], joined)
        out.append(model.head(hidden[0, -1]))
        seen.append(draw(position, out[-1]))
    return torch.stack(out), seen[len(tokens) :]


def slow_draw(request: Request, num_drawn: int) -> Draw:
    """Draws drafts as a request asks for it, behind `num_drawn` new tokens."""
    params, draws = request.params, Draws([request.params.seed])

    def draw(position: int, logits: Tensor) -> int:
        probs = filtered_probs(logits.unsqueeze(0), params.temperature, params.top_k, params.top_p)
        return int(pick(probs, draws.at("draft", torch.tensor([num_drawn + position]))))

    return draw


def _run(
    model: Transformer,
    wanted: Callable[[Phase], bool],
    tokens: Sequence[int],
    count: int,
    hidden: Tensor | None = None,
) -> Tensor:
    """Outputs [1, count, hidden] of some phases over the first `count` positions."""
    length = count + 1 + model.config.mtp_depth  # training has targets behind them, which nobody reads here
    padded = [*tokens, *[0] * length][:length]
    state = {"tokens": torch.tensor([padded])}
    if hidden is not None:
        state["hidden"] = hidden
    phases = [phase for phase in model.phases() if phase.name == "mask" or wanted(phase)]
    model.run_phases(tuple(phases), state)
    return state["hidden"]


def _is_main(phase: Phase) -> bool:
    return phase.name != "loss" and not phase.layer.startswith("mtp")


def _is_of(name: str, phase: Phase) -> bool:
    return phase.name != "loss" and phase.layer in (name, f"{name}.block")
