"""Acceptance in decoding itself, and its control: drafts that know nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_generate.chance import chance_of
from moe_runtime.cli.bench_generate.repetition import period_of_end, repeating_share
from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.generate.engine import Decoding, Engine
from moe_runtime.generate.request import Continuation, Request


class RecordingDecoding(Decoding):
    """Decoding that notes the first draft of each pass."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        super().__init__(engine, requests)
        self.drafts: list[int] = []

    def draw_draft(self, position: int, logits: Tensor) -> Tensor:
        tokens = super().draw_draft(position, logits)
        if position == 0:
            self.drafts += tokens.tolist()
        return tokens


class ShuffledDecoding(Decoding):
    """Decoding whose drafts come out of a pool, whatever the context; each is certain of itself.

    Args:
        pool: int64 [size], drawn from with replacement.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], pool: Tensor, seed: int = 0) -> None:
        super().__init__(engine, requests)
        self._pool, self._generator = pool, torch.Generator().manual_seed(seed)

    def draw_draft(self, position: int, logits: Tensor) -> Tensor:
        chosen = torch.randint(len(self._pool), (logits.shape[0],), generator=self._generator)
        tokens = self._pool[chosen].to(logits.device)
        certain = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        self.draft_probs.append(certain.scatter_(1, tokens.unsqueeze(1), 1.0))
        return tokens


def acceptance(subject: Subject, temperature: float) -> dict[str, Any]:
    """Decode all prompts with drafts, and again with shuffled ones.

    Returns:
        rate: of each draft of a pass, standing over tried; tokens_per_pass; repeating: share of continuations
        whose end repeats; rate_without_repeating: over the others, None if there are none; control: of
        `shuffled_control`.
    """
    requests = subject.requests(subject.settings.tokens, temperature)
    decoding = RecordingDecoding(Engine(subject.model, subject.drafts), requests)
    for _ in decoding:
        pass
    results = decoding.results
    honest = [one for one in results if period_of_end(one.tokens) is None]
    return {
        "temperature": temperature,
        "tokens": sum(len(one.tokens) for one in results),
        "rate": rate_of(results),
        "tokens_per_pass": sum(len(one.tokens) - 1 for one in results) / sum(one.passes for one in results),
        "repeating": repeating_share([one.tokens for one in results]),
        "rate_without_repeating": rate_of(honest) if honest else None,
        "control": shuffled_control(subject, requests, decoding.drafts),
    }


def shuffled_control(
    subject: Subject, requests: Sequence[Request], drafts: Sequence[int]
) -> dict[str, float]:
    """Acceptance of drafts shuffled over all prompts and places, one a pass, and what chance gives.

    Returns:
        rate, chance, standard_error, deviation (of the rate from chance, in standard errors), trials.
    """
    decoding = ShuffledDecoding(Engine(subject.model, 1), requests, torch.tensor(drafts))
    tried: list[int] = []  # the token that came out where a draft was tried
    seen: set[int] = set()
    for piece in decoding:
        if piece.request in seen and piece.tokens:
            tried.append(piece.tokens[0])
        seen.add(piece.request)
    measured = rate_of(decoding.results)[0]
    chance = chance_of(drafts, tried)
    return {
        "rate": measured,
        "chance": chance.rate,
        "standard_error": chance.standard_error,
        "deviation": chance.deviation(measured),
        "trials": len(tried),
    }


def rate_of(results: Sequence[Continuation]) -> list[float]:
    """Share of drafts that stood, by their place in a pass, over all passes."""
    drafted = [sum(counts) for counts in zip(*(one.drafted for one in results), strict=True)]
    accepted = [sum(counts) for counts in zip(*(one.accepted for one in results), strict=True)]
    return [stood / tried for stood, tried in zip(accepted, drafted, strict=True)]
