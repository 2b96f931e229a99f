"""Prompts in, text out: streamed if there is one, together if there are several; figures at the end."""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import typer

from moe_runtime.cli.generation.open import Generator, warn
from moe_runtime.errors import ConfigError
from moe_runtime.generate.engine import Piece
from moe_runtime.generate.request import Continuation, Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.generate.text import TextStream
from moe_runtime.metrics.report.shown import unhidden


@dataclass(frozen=True)
class Answering:
    """How prompts are continued.

    Args:
        max_tokens: new tokens of each at most.
        params: of the first; prompt i has seed + i.
        stops: strings that end a continuation.
    """

    max_tokens: int
    params: SamplingParams
    stops: tuple[str, ...]


@dataclass
class Answer:
    """One prompt on its way, on the rank that continues it."""

    prompt: str
    ids: list[int]
    text: TextStream
    has_text: bool = True  # without a tokenizer ids are printed
    written: list[str] = field(default_factory=list)

    def take(self, piece: Piece) -> str:
        """The text that a piece has made certain."""
        new = self.text.take(finish=piece.finished)
        if not self.has_text:
            new = "".join(f"{token} " for token in piece.tokens)
        self.written.append(new)
        return new


def answer_all(
    generator: Generator, how: Answering, prompts: list[tuple[str, list[int]]], as_json: bool
) -> None:
    """Continue prompts, print what comes of them; rank 0 prints for all."""
    peers = generator.peers
    _warn_of_length(generator, how, max(len(ids) for _, ids in prompts))
    numbers = range(peers.rank, len(prompts), peers.world_size)
    streams = not as_json and len(prompts) == 1
    if streams and peers.is_first:
        _write(prompts[0][0])
    began = time.monotonic()
    mine = [(number, *prompts[number]) for number in numbers]
    said, first_s = continue_some(generator, how, mine, streams)
    seconds = time.monotonic() - began
    gathered = [one for each in peers.gather_json(said) for one in each]
    if not peers.is_first:
        return
    results = sorted(gathered, key=lambda one: one["number"])
    if streams:
        typer.echo()
    elif not as_json:
        for one in results:
            text = one["text"] if one["text"] is not None else " ".join(map(str, one["tokens"]))
            typer.echo(_shown(one["prompt"] + text) + "\n")
    report = _report(generator, results, seconds, first_s)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        typer.echo(summary(report), err=True)


def continue_some(
    generator: Generator, how: Answering, prompts: list[tuple[int, str, list[int]]], streams: bool
) -> tuple[list[dict[str, Any]], float]:
    """Continue prompts (number, text, ids) of this rank.

    Returns:
        what is said of each, and seconds to the first token.
    """
    answers, requests = [], []
    id_bytes = generator.tokenizer.id_bytes if generator.tokenizer is not None else ()
    if how.stops and generator.tokenizer is None:
        raise ConfigError("--stop: expected a model with a tokenizer, got none; name one with --tokenizer")
    for number, prompt, ids in prompts:
        answers.append(Answer(prompt, ids, TextStream(id_bytes, how.stops), generator.tokenizer is not None))
        params = replace(how.params, seed=how.params.seed + number)
        requests.append(Request(ids, how.max_tokens, params, generator.eos_ids, answers[-1].text))
    began, first_s = time.monotonic(), float("nan")
    decoding = generator.engine.start(requests)
    for piece in decoding:
        first_s = time.monotonic() - began if first_s != first_s else first_s
        text = answers[piece.request].take(piece)
        if streams:
            _write(text)
    numbers = [number for number, _, _ in prompts]
    said = [_said(*one) for one in zip(numbers, answers, decoding.results, strict=True)]
    return said, first_s


def _said(number: int, answer: Answer, result: Continuation) -> dict[str, Any]:
    return {
        "number": number,
        "prompt": answer.prompt,
        "text": "".join(answer.written) if answer.has_text else None,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(answer.ids),
        "completion_tokens": len(result.tokens),
        "prompt_cache_hit_tokens": result.prompt_cache_hit_tokens,
        "prompt_cache_miss_tokens": result.prompt_cache_miss_tokens,
        "passes": result.passes,
        "drafted": result.drafted,
        "accepted": result.accepted,
    }


def _report(
    generator: Generator, results: list[dict[str, Any]], seconds: float, first_s: float
) -> dict[str, Any]:
    tokens = sum(one["completion_tokens"] for one in results)
    passes = sum(one["passes"] for one in results)
    drafted, stood = (_columns(results, key) for key in ("drafted", "accepted"))
    shared = {
        "checkpoint": str(generator.checkpoint.path),
        "step": generator.checkpoint.manifest.step,
        "seconds": seconds,
        "first_token_s": first_s,
        "tokens_per_s": tokens / seconds,
        "drafts": generator.engine.num_drafts,
        "acceptance": [a / d for a, d in zip(stood, drafted, strict=True)],
        "tokens_per_pass": (tokens - len(results)) / passes if passes else None,
        "cache_bytes_per_token": generator.engine.bytes_per_token,
    }
    if len(results) == 1:
        return {**shared, **{key: value for key, value in results[0].items() if key != "number"}}
    return {**shared, "completion_tokens": tokens, "results": results}


def _columns(results: list[dict[str, Any]], key: str) -> list[int]:
    """Sums over results by position; one that ended with its first token has no drafts."""
    return [sum(column) for column in zip(*(one[key] for one in results if one[key]), strict=True)]


def summary(report: dict[str, Any]) -> str:
    """One line of figures."""
    results = report.get("results", [report])
    prompt = sum(one["prompt_tokens"] for one in results)
    hits = sum(one["prompt_cache_hit_tokens"] for one in results)
    parts = [
        f"{report['completion_tokens']} tokens in {report['seconds']:.2f} s "
        f"({report['tokens_per_s']:.0f}/s, first after {report['first_token_s']:.3f} s)",
        f"prompt {prompt} tokens, {hits} from the cache",
    ]
    if report["acceptance"]:
        shares = ", ".join(f"{share:.0%}" for share in report["acceptance"])
        parts.append(f"{report['tokens_per_pass']:.2f} tokens a pass, drafts accepted {shares}")
    return "[" + " | ".join(parts) + "]"


def _warn_of_length(generator: Generator, how: Answering, longest: int) -> None:
    length = generator.trained_length
    if longest + how.max_tokens > length and generator.peers.is_first:
        warn(f"up to {longest + how.max_tokens} tokens, but the model was trained on sequences of {length}")


def _shown(text: str) -> str:
    """A terminal gets no control characters."""
    return unhidden(text) if sys.stdout.isatty() else text


def _write(text: str) -> None:
    typer.echo(_shown(text), nl=False)
    sys.stdout.flush()
