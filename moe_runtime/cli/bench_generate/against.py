"""Decode speed of two checkpoints of ours in turn, at several context lengths and batch sizes.

What is timed is decoding alone: the context is read before, then tokens follow one a pass and greedily, from
the stream of ids through all layers and the head to the next id. After each timing the cache is cut back to
the context, so all rounds do the same work on the same tokens. Drafts are left out, they would mix in how
well they stand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.cli.bench_generate.turns import in_turn
from moe_runtime.config.counts import cache_elements
from moe_runtime.errors import ConfigError
from moe_runtime.model.inference import InferenceModel

PIECE = 512  # tokens a row reads at a time before timing, for the memory's sake
THIS, OTHER = "this", "against"


@dataclass(frozen=True)
class Shapes:
    """What two checkpoints are timed at.

    Args:
        path: the other checkpoint.
        contexts: tokens that are read before.
        batches: rows that decode together.
        tokens: decoded by each row in a round.
    """

    path: Path
    contexts: Sequence[int] = (128, 1024)
    batches: Sequence[int] = (1, 8)
    tokens: int = 256


def compare(subject: Subject, shapes: Shapes) -> dict[str, Any]:
    """Time both at every shape.

    Returns:
        `checkpoints` (THIS and OTHER: path, run, step, attention, parameters and what a token takes in the
        cache), `tokens`, and `shapes`, a list of `context`, `batch` and `results` of `in_turn`, whose ratio
        is tokens/s over those of OTHER.

    Raises:
        CheckpointError: nothing usable at the other's path.
        ConfigError: it is of another vocabulary, so there is no text for both, or the text is too short.
    """
    other = Subject(replace(subject.settings, path=shapes.path, drafts=0))
    wanted, got = (one.transformer.config.vocab_size for one in (subject, other))
    if wanted != got:
        raise ConfigError(
            f"--against {shapes.path}: expected a model of {wanted} tokens as the first, got {got}"
        )
    both = {THIS: subject, OTHER: other}
    found = [
        _at(both, _text(subject, batch, context), shapes.tokens)
        for context in shapes.contexts
        for batch in shapes.batches
    ]
    described = {name: _describe(one) for name, one in both.items()}
    return {"checkpoints": described, "tokens": shapes.tokens, "shapes": found}


def _text(subject: Subject, batch: int, context: int) -> Tensor:
    rows = subject.rows(batch, context)
    if len(rows) < batch:
        wanted = f"at most the {len(rows)} rows of {context} held-out tokens in {subject.settings.data}"
        raise ConfigError(f"--batch: expected {wanted}, got {batch}")
    return rows


def _at(both: dict[str, Subject], context: Tensor, tokens: int) -> dict[str, Any]:
    """One shape, by the rows [batch, context] that are read before."""
    contenders = {name: contender(one.model, context, tokens) for name, one in both.items()}
    results = in_turn(contenders, OTHER, both[THIS].settings.rounds)
    return {"context": context.shape[1], "batch": context.shape[0], "results": results}


def contender(model: InferenceModel, context: Tensor, tokens: int) -> Callable[[int], int]:
    """Decodes `tokens` of each row of int64 [batch, context] anew at every call, and says how many in all."""
    rows, length = context.shape
    context = context.to(model.device)
    cache = model.new_cache(rows, length + tokens)
    hidden = torch.empty(0)
    for piece in context.split(PIECE, dim=1):
        hidden = model.read(cache, piece)
    last = hidden.view(rows, -1, hidden.shape[1])[:, -1]
    first = model.logits(last).argmax(dim=1, keepdim=True)

    def decode(turn: int) -> int:
        cache.lengths.fill_(length)
        ids = first
        for _ in range(tokens):
            ids = model.logits(model.read(cache, ids)).argmax(dim=1, keepdim=True)
        ids.sum().item()  # waits for a GPU
        return rows * tokens

    return decode


def _describe(subject: Subject) -> dict[str, Any]:
    config, cache = subject.transformer.config, subject.model.new_cache(1, 1)
    return {
        "path": str(subject.settings.path),
        "run": subject.name,
        "step": subject.step,
        "attention": config.attention,
        "parameters": sum(parameter.numel() for parameter in subject.transformer.parameters()),
        "cache_elements_per_token": cache_elements(config),
        "cache_bytes_per_token": cache.bytes_per_token,
    }
