"""Loss by position in a window: does a model profit from context, and does it bear lengths it never saw?

A mean over whole windows hides both. Three ways to look at the same windows of the same text:

    buckets     mean loss of targets by how much context stands before them: [0, 16), [16, 32), ...
    beyond      targets beyond the old length, with all the context that the window has
    short       the very same targets, with no more context than the old length

"Beyond against inside" compares other tokens: those early in a window have little context, which makes the
inside look worse and a long context better than it is. "Beyond against short" compares each token with
itself, so that only the context differs; it is above 1 where positions beyond the old length harm the model,
and below 1 where it makes use of what lies further back than it could see before.

Short contexts come from windows of the old length that slide by an eighth of it, each giving the losses of
its last eighth: a target so has seven eighths to all of the old length before it. Sliding by one token would
be exact and cost sixteen times as much.

Windows run over documents, as in training (Ref: DSV3 §4.1): the longer a window, the likelier it holds the
end of one text and the beginning of another, where no context helps. All models meet the same ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_runtime.evaluation.intervals import Interval, bootstrap_ratio, mean_interval
from moe_runtime.model.loss import token_losses
from moe_runtime.model.transformer import Transformer

SLIDES = 8  # windows of short context move by 1 / SLIDES of their length
FIRST_BUCKET = 16


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the targets at positions first .. stop - 1, nats a token, over windows."""

    first: int
    stop: int
    loss: Interval


@dataclass(frozen=True)
class PositionLoss:
    """What a model makes of windows longer than its old context.

    Args:
        old_length: tokens of context before any extension.
        buckets: from the first position to the last, each as long as all before it.
        inside, late, beyond, short: mean losses, nats a token, with intervals over windows: of targets at
            positions below `old_length`, of those in the second half of them, of those beyond, and of those
            beyond with short context.
        beyond_to_inside, beyond_to_late, beyond_to_short: ratios of these, with intervals over windows.
    """

    windows: int
    old_length: int
    buckets: tuple[Bucket, ...]
    inside: Interval
    late: Interval
    beyond: Interval
    short: Interval
    beyond_to_inside: Interval
    beyond_to_late: Interval
    beyond_to_short: Interval


def loss_by_position(model: Transformer, batches: Iterable[Tensor], old_length: int) -> PositionLoss:
    """Measure a model on windows of tokens.

    Args:
        batches: int64 [windows, seq_len + 1] each; seq_len a multiple of old_length, at least twice it.
        old_length: a multiple of `SLIDES`.
    """
    batches = list(batches)
    full = torch.cat([window_losses(model, rows) for rows in batches])
    short = torch.cat([short_losses(model, rows, old_length) for rows in batches])
    return summarise(full, short, old_length)


@torch.no_grad()
def window_losses(model: Transformer, rows: Tensor) -> Tensor:
    """Cross-entropy of each next token of rows [windows, seq_len + 1]: float64 [windows, seq_len], CPU."""
    rows = rows.to(next(model.parameters()).device)
    hidden = model.hidden(rows[:, :-1]).flatten(0, 1)
    losses = token_losses(hidden, model.head.weight, rows[:, 1:].flatten())
    return losses.view(rows.shape[0], -1).double().cpu()


def short_losses(model: Transformer, rows: Tensor, old_length: int) -> Tensor:
    """Losses of the targets beyond `old_length` with at most that much context.

    Args:
        rows: int64 [windows, seq_len + 1].

    Returns:
        float64 [windows, seq_len - old_length].
    """
    slide = old_length // SLIDES
    sliding = rows[:, slide:].unfold(1, old_length + 1, slide)  # [windows, moves, old_length + 1]
    losses = [window_losses(model, sliding[:, move])[:, -slide:] for move in range(sliding.shape[1])]
    return torch.cat(losses, dim=1)


def summarise(full: Tensor, short: Tensor, old_length: int) -> PositionLoss:
    """Buckets, means and ratios of losses.

    Args:
        full: float64 [windows, seq_len].
        short: float64 [windows, seq_len - old_length], of the last targets of these windows.
    """
    by_window = {
        "inside": full[:, :old_length].mean(1).tolist(),
        "late": full[:, old_length // 2 : old_length].mean(1).tolist(),
        "beyond": full[:, old_length:].mean(1).tolist(),
        "short": short.mean(1).tolist(),
    }
    ratios = {
        f"beyond_to_{name}": bootstrap_ratio(by_window["beyond"], by_window[name])
        for name in ("inside", "late", "short")
    }
    means = {name: mean_interval(values) for name, values in by_window.items()}
    return PositionLoss(full.shape[0], old_length, _buckets(full), **means, **ratios)


def _buckets(full: Tensor) -> tuple[Bucket, ...]:
    edges = [0, FIRST_BUCKET]
    while edges[-1] < full.shape[1]:
        edges.append(min(2 * edges[-1], full.shape[1]))
    spans = pairwise(edges)
    return tuple(
        Bucket(first, stop, mean_interval(full[:, first:stop].mean(1).tolist())) for first, stop in spans
    )
