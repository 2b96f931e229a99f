"""Tokens/s at batch 1: cached decoding against no cache and transformers, and with drafts against without."""

from collections.abc import Callable
from typing import Any

from moe_runtime.cli.bench_generate.peer import Peer
from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.cli.bench_generate.turns import in_turn
from moe_runtime.generate.decode_reference import generate as generate_without_cache
from moe_runtime.generate.engine import Engine

CACHED, WITHOUT_CACHE, PEER = "cached", "no cache", "transformers, cached"
LONG = 512  # tokens over which a cache is compared with none


def cache_speed(subject: Subject, tokens: int = LONG) -> dict[str, Any]:
    """Greedy decoding, a prompt a round: with a cache, without, and by transformers if it can.

    Returns:
        `tokens`, `results` of `in_turn`, and `agreeing`: how many leading tokens are those of ours.
    """
    engine = Engine(subject.model)
    requests = subject.requests(tokens, temperature=0.0)

    def plain(prompt: list[int]) -> list[int]:
        return generate_without_cache(subject.transformer, prompt, tokens, device=subject.model.device)

    makers: dict[str, Callable[[int], list[int]]] = {
        CACHED: lambda turn: engine.generate([requests[turn % len(requests)]])[0].tokens,
        WITHOUT_CACHE: lambda turn: plain(list(requests[turn % len(requests)].tokens)),
    }
    baseline = WITHOUT_CACHE
    if Peer.knows(subject.transformer):
        peer, baseline = Peer(subject.transformer), PEER
        makers[PEER] = lambda turn: peer.tokens(list(requests[turn % len(requests)].tokens), tokens)
    made: dict[str, list[int]] = {}

    def contender(name: str) -> Callable[[int], int]:
        def make(turn: int) -> int:
            found = makers[name](turn)
            made.setdefault(name, found)  # of the first prompt
            return len(found)

        return make

    results = in_turn({name: contender(name) for name in makers}, baseline, subject.settings.rounds)
    agreeing = {name: leading_equal(found, made[CACHED]) for name, found in made.items() if name != CACHED}
    return {"tokens": tokens, "results": results, "agreeing": agreeing}


def draft_speed(subject: Subject) -> dict[str, Any]:
    """Sampling at temperature 1 with 0, 1, ... drafts a pass; the first is the baseline.

    Returns:
        `tokens` and `results` of `in_turn`.
    """
    tokens = subject.settings.tokens
    requests = subject.requests(tokens, temperature=1.0)

    def contender(drafts: int) -> Callable[[int], int]:
        engine = Engine(subject.model, drafts)
        return lambda turn: len(engine.generate([requests[turn % len(requests)]])[0].tokens)

    contenders = {f"{drafts} drafts": contender(drafts) for drafts in range(subject.drafts + 1)}
    return {"tokens": tokens, "results": in_turn(contenders, "0 drafts", subject.settings.rounds)}


def leading_equal(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
