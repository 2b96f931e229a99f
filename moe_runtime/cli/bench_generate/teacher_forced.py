"""Acceptance on given text: what the drafts would reach if the text came out.

Every position of held-out text is looked at once: the main model's distribution p of the next token, and
that of the MTP module that drafts the same token, q. Two ways to accept: greedy, where both have the same
likeliest token, and sampled, with probability sum min(p, q). A deeper draft counts only where those before it
stood, as in decoding; its module reads the text, not the drafts.
"""

from typing import Any

import torch
from torch import Tensor

from moe_runtime.model.inference import InferenceModel

ROWS_AT_A_TIME = 8


def teacher_forced(model: InferenceModel, rows: Tensor) -> dict[str, Any]:
    """Acceptance by position over rows of text.

    Args:
        model: with MTP modules.
        rows: int64 [rows, tokens], tokens above 1 + mtp_depth.

    Returns:
        positions, and for each draft of a pass: `greedy` and `sampled`, the shares that stand, and `label`,
        the share whose likeliest token is the text's.
    """
    depth = model.config.mtp_depth
    sums = torch.zeros(3, depth, dtype=torch.float64)
    positions = 0
    for part in rows.split(ROWS_AT_A_TIME):
        sums += torch.stack([_sums(found) for found in _standing(model, part.to(model.device))])
        positions += part.shape[0] * (part.shape[1] - 1 - depth)
    greedy, sampled, label = (sums / positions).tolist()
    return {"positions": positions, "greedy": greedy, "sampled": sampled, "label": label}


def _standing(model: InferenceModel, rows: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per module, at slots L = 1, 2, ...: does the draft for L + 1 + d stand, greedily, sampled, as label."""
    count, tokens = rows.shape
    depth = model.config.mtp_depth
    cache = model.new_cache(count, tokens)
    hidden = model.read(cache, rows)
    main = _probs(model, hidden, count)  # at slot s: of token s + 1
    places = tokens - 1 - depth
    greedy, sampled, label = [], [], []
    for number in range(depth):
        first = 1 + number  # slot of the module's first output
        before = hidden.view(count, -1, hidden.shape[-1])[:, :-1].flatten(0, 1)
        spans = torch.full((count,), tokens - first, dtype=torch.int64)
        hidden = model.draft(number, cache, before, torch.full_like(spans, first), spans)
        draft = _probs(model, hidden, count)[:, :places]
        target = main[:, first : first + places]
        best = draft.argmax(dim=-1)
        greedy.append((best == target.argmax(dim=-1)).double())
        sampled.append(torch.minimum(draft, target).sum(dim=-1).double())
        text = torch.nn.functional.pad(rows[:, first + 1 :], (0, 1), value=-1)[:, :places]
        label.append((best == text).double())
    return greedy, sampled, label


def _sums(standing: list[Tensor]) -> Tensor:
    """Sum over positions of each draft's standing together with all before it: float64 [depth]."""
    return torch.stack(standing).cumprod(dim=0).flatten(1).sum(dim=1).cpu()


def _probs(model: InferenceModel, hidden: Tensor, rows: int) -> Tensor:
    logits = model.logits(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(wide, dim=-1).view(rows, -1, wide.shape[-1])
