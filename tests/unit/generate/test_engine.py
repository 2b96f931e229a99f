"""The engine gives what decoding without a cache gives, however it reads, drafts and shares its batch."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from moe_runtime.generate.decode_reference import generate
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.prefix_cache import open_prefix_cache
from moe_runtime.generate.prefix_fingerprint import latent_form_of
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.generate.models import draft_model
from tests.unit.model.samples import draw_tokens

NEW = 14
LENGTHS = (9, 1, 4, 17)
GREEDY = SamplingParams(temperature=0.0)


@cache
def model_of(dtype: torch.dtype = torch.float64, depth: int = 2, attention: str = "mla") -> Transformer:
    return draft_model(depth, dtype=dtype, attention=attention)


def prompts_of(model: Transformer, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [draw_tokens(model.config, 1, length, seed=length)[0].tolist() for length in lengths]


@cache
def greedy_oracle(
    dtype: torch.dtype, prompt: tuple[int, ...], attention: str = "mla"
) -> tuple[list[int], Tensor]:
    """New tokens by full forwards, and the logits [NEW, vocab] that they are the largest of."""
    model = model_of(dtype, attention=attention)
    tokens = generate(model, prompt, NEW)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return tokens, logits


class WatchedModel(InferenceModel):
    """Keeps the logits that tokens are drawn from, those of drafts left out."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.seen: list[Tensor] = []
        self._read = torch.empty(0)

    def read(self, *given: object) -> Tensor:
        self._read = super().read(*given)  # type: ignore[arg-type]
        return self._read

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        if hidden is self._read or not self.seen:  # after a prompt, only its last token's are asked for
            self.seen.append(logits)
        return logits


def decode_watched(engine: Engine, requests: Sequence[Request]) -> tuple[list[list[int]], list[Tensor]]:
    """New tokens of each request, and the logits [new, vocab] that they were drawn from."""
    assert isinstance(engine.model, WatchedModel)
    decoding = engine.start(requests)
    seen = engine.model.seen
    logits: list[list[Tensor]] = [[] for _ in requests]
    passes, lines = 0, iter(())
    for piece in decoding:
        if len(seen) > passes:
            passes = len(seen)
            width = 1 if passes == 1 else engine.num_drafts + 1
            lines = iter(seen[-1].split(width))
        logits[piece.request].append(next(lines)[: len(piece.tokens)])
    return [result.tokens for result in decoding.results], [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("prefill", [3, 1024])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_greedy_output_and_logits_are_those_without_a_cache(
    attention: str, num_drafts: int, rows: int, prefill: int
) -> None:
    dtype = torch.float32
    model = model_of(dtype, attention=attention)
    prompts = prompts_of(model)[:rows]
    engine = Engine(WatchedModel(model), num_drafts, prefill=prefill)
    tokens, logits = decode_watched(engine, [Request(prompt, NEW, GREEDY) for prompt in prompts])
    for prompt, got, lines in zip(prompts, tokens, logits, strict=True):
        wanted, oracle = greedy_oracle(dtype, tuple(prompt), attention)
        assert got == wanted
        assert float((lines - oracle).abs().max() / (oracle.max() - oracle.min())) <= 1e-5


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_sampled_row_is_the_same_alone_and_beside_rows_that_end(num_drafts: int) -> None:
    engine = Engine(InferenceModel(model_of()), num_drafts)
    params = [
        SamplingParams(1.0, seed=1),
        SamplingParams(0.7, top_k=4, seed=2),
        SamplingParams(1.3, top_p=0.8, seed=3),
        SamplingParams(0.0, seed=4),
    ]
    lasts = (3, 14, 1, 9)  # new tokens
    requests = [
        Request(prompt, last, one)
        for prompt, last, one in zip(prompts_of(model_of()), lasts, params, strict=True)
    ]
    alone = [engine.generate([request])[0] for request in requests]
    assert [len(result.tokens) for result in alone] == list(lasts)
    assert engine.generate(requests) == alone
    turned = engine.generate([requests[1], requests[3], requests[1]])
    assert turned == [alone[1], alone[3], alone[1]]


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_stop_id_ends_a_row_wherever_it_comes(num_drafts: int) -> None:
    engine = Engine(InferenceModel(model_of()), num_drafts)
    within = 0  # stops among drafts that stood, with more that stood behind them
    for seed, prompt in enumerate(prompts_of(model_of())):
        request = Request(prompt, 24, SamplingParams(1.0, seed=seed))
        whole = engine.generate([request])[0]
        assert (whole.finish_reason, len(whole.tokens)) == ("length", 24)
        for stop in set(whole.tokens):
            (result,) = engine.generate([replace(request, stop_ids=frozenset({stop, 99}))])
            end = whole.tokens.index(stop)
            assert (result.finish_reason, result.tokens) == ("stop", whole.tokens[:end])
            within += end < result.passes + sum(result.accepted) and end > 0
    assert within > 0 or num_drafts == 0


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_stops_are_told_each_token_and_end_with_it(num_drafts: int) -> None:
    engine = Engine(InferenceModel(model_of()), num_drafts)
    prompts = prompts_of(model_of())
    whole = engine.generate([Request(prompt, NEW, GREEDY) for prompt in prompts])
    for end in (1, 2, 5, 6, 7, NEW):
        told: list[list[int]] = [[] for _ in prompts]

        def stops(token: int, heard: list[int], end: int = end) -> bool:
            heard.append(token)
            return len(heard) == end

        requests = [
            Request(prompt, NEW, GREEDY, stops=lambda token, heard=heard: stops(token, heard))
            for prompt, heard in zip(prompts, told, strict=True)
        ]
        results = engine.generate(requests)
        assert [result.tokens for result in results] == [result.tokens[:end] for result in whole] == told
        assert {result.finish_reason for result in results} == {"stop"}


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_request_gets_the_tokens_it_asked_for_and_pieces_that_add_up(num_drafts: int) -> None:
    engine = Engine(InferenceModel(model_of()), num_drafts)
    prompts = prompts_of(model_of())
    (longest,) = engine.generate([Request(prompts[0], 11, GREEDY)])
    for new in range(1, 12):
        decoding = engine.start([Request(prompts[0], new, GREEDY), Request(prompts[1], 5, GREEDY)])
        pieces: list[list[int]] = [[], []]
        ended = [False, False]
        for piece in decoding:
            assert not ended[piece.request]
            pieces[piece.request] += piece.tokens
            ended[piece.request] = piece.finished
        assert ended == [True, True] and not decoding.alive
        assert pieces == [result.tokens for result in decoding.results]
        assert pieces[0] == longest.tokens[:new] and len(pieces[1]) == 5
        assert {result.finish_reason for result in decoding.results} == {"length"}


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_passes_and_drafts_are_counted(num_drafts: int) -> None:
    requests = [
        Request(prompt, 30, SamplingParams(1.0, seed=row))
        for row, prompt in enumerate(prompts_of(model_of()))
    ]
    for result in Engine(InferenceModel(model_of()), num_drafts).generate(requests):
        assert result.drafted == [result.passes] * num_drafts
        assert result.accepted == sorted(result.accepted, reverse=True)
        made = 1 + result.passes + sum(result.accepted)
        assert 0 <= made - 30 <= num_drafts  # the last pass may give more than is wanted
        assert result.tokens_per_pass == 29 / result.passes
        assert (result.prompt_cache_hit_tokens, result.passes < 29) == (0, num_drafts > 0)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_no_requests_are_answered_with_nothing(num_drafts: int) -> None:
    model = model_of()
    store = open_prefix_cache(latent_form_of(model), 10**6)
    for held in (None, store):
        assert Engine(InferenceModel(model), num_drafts, held).generate([]) == []


def test_drafts_without_modules_and_empty_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="MTP modules"):
        Engine(InferenceModel(model_of(depth=0)), 1)
    with pytest.raises(ValueError, match="at least one token"):
        Request([])
    with pytest.raises(ValueError, match="max_new_tokens"):
        Request([1], 0)
