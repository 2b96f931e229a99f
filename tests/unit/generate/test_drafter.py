"""Drafts of a real decoding equal those of the oracle, which knows no cache."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_runtime.generate.engine import Decoding, Engine
from moe_runtime.generate.prefix_cache import open_prefix_cache
from moe_runtime.generate.prefix_fingerprint import latent_form_of
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.generate.models import draft_model
from tests.unit.generate.slow_drafts import slow_drafts, slow_draw
from tests.unit.model.samples import draw_tokens

LENGTHS = (1, 9, 2, 4)
PARAMS = (SamplingParams(1.0), SamplingParams(0.0), SamplingParams(0.8, top_k=4), SamplingParams(1.0))


def requests_of(model: Transformer, lengths: Sequence[int], new: int = 7) -> list[Request]:
    """Prompts of these lengths, some drawn and some greedy, that end at different times."""
    return [
        Request(
            draw_tokens(model.config, 1, length, seed=length)[0].tolist(),
            new + row,
            SamplingParams(params.temperature, params.top_k, params.top_p, seed=row),
        )
        for row, (length, params) in enumerate(zip(lengths, PARAMS, strict=False))
    ]


def check_drafts(model: Transformer, engine: Engine, requests: Sequence[Request]) -> Decoding:
    """Decode, and compare the drafts of every pass with the oracle's."""
    decoding = engine.start(requests)
    draw = decoding.draw_draft
    passes: list[list[tuple[int, list[int], list[Tensor], list[int]]]] = []

    def watched(position: int, logits: Tensor) -> Tensor:
        drafted = draw(position, logits)
        if position == 0:
            begun = [[*requests[one].tokens, *decoding.results[one].tokens] for one in decoding.alive]
            passes.append([(one, text, [], []) for one, text in zip(decoding.alive, begun, strict=True)])
        for (*_, seen, tokens), line, token in zip(passes[-1], logits, drafted.tolist(), strict=True):
            seen.append(line)
            tokens.append(token)
        return drafted

    decoding.draw_draft = watched  # type: ignore[method-assign]
    for _ in decoding:
        pass
    for rows in passes:
        for number, text, logits, tokens in rows:
            draw_slow = slow_draw(requests[number], len(text) - len(requests[number].tokens))
            wanted, drawn = slow_drafts(model, text, engine.num_drafts, draw_slow)
            torch.testing.assert_close(torch.stack(logits), wanted, rtol=1e-9, atol=1e-9)
            assert tokens == drawn
    assert passes
    return decoding


@pytest.mark.parametrize("separator", [None, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_oracle_is_what_training_computes(depth: int, separator: int | None) -> None:
    model = draft_model(depth, separator=separator)
    tokens = draw_tokens(model.config, 1, 8 + 1 + depth)
    total = torch.zeros(())
    for end in range(2, 10):  # tokens below `end` are known
        truth = tokens[0, end : end + depth]
        logits, _ = slow_drafts(
            model, tokens[0, :end].tolist(), depth, lambda at, _, truth=truth: int(truth[at])
        )
        total = total + nn.functional.cross_entropy(logits, truth, reduction="sum") / 8
    with torch.no_grad():
        torch.testing.assert_close(total.double(), model.losses(tokens).loss_mtp.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_equal_the_oracles_at_every_pass(depth: int, num_drafts: int) -> None:
    model = draft_model(depth)
    reader = InferenceModel(model)
    requests = requests_of(model, LENGTHS)
    batch = check_drafts(model, Engine(reader, num_drafts), requests)
    assert sum(sum(result.accepted) for result in batch.results) > 5
    alone = check_drafts(model, Engine(reader, num_drafts), requests[:1])
    assert alone.results[0] == batch.results[0]


@pytest.mark.parametrize("separator", [None, 2])
@pytest.mark.parametrize("prefill", [1, 3])
@pytest.mark.parametrize(("depth", "num_drafts"), [(1, 2), (3, 4)])
def test_prompts_in_pieces_lead_to_the_same_drafts(
    depth: int, num_drafts: int, prefill: int, separator: int | None
) -> None:
    model = draft_model(depth, separator=separator)
    engine = Engine(InferenceModel(model), num_drafts, prefill=prefill)
    check_drafts(model, engine, requests_of(model, (12, 1, 6, 7), new=4))
    check_drafts(model, engine, requests_of(model, (11,), new=4))


@pytest.mark.parametrize("prefill", [1, pytest.param(2, marks=pytest.mark.slow), 1024])
@pytest.mark.parametrize(("depth", "num_drafts"), [pytest.param(2, 1, marks=pytest.mark.slow), (3, 3)])
def test_what_a_store_knows_leads_to_the_same_drafts(depth: int, num_drafts: int, prefill: int) -> None:
    model = draft_model(depth)
    # A hit of all but the last token, two of a block and a rest, and none.
    requests = requests_of(model, (64, 65, 78, 9), new=4)
    store = open_prefix_cache(latent_form_of(model), 10**7)
    Engine(InferenceModel(model), num_drafts, store).generate(requests)
    engine = Engine(InferenceModel(model), num_drafts, store, prefill=prefill)
    decoding = check_drafts(model, engine, requests)
    assert [result.prompt_cache_hit_tokens for result in decoding.results] == [63, 64, 64, 0]
    check_drafts(model, engine, requests[1:2])


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_what_decoding_leaves_in_a_store_is_what_reading_leaves(num_drafts: int) -> None:
    model = draft_model(2)
    reader, form = InferenceModel(model), latent_form_of(model)
    decoded, read = (open_prefix_cache(form, 10**7) for _ in range(2))
    # They end at all places around the 64 tokens of a block, where drafts that stood are not yet run again.
    ends = [Request(draw_tokens(model.config, 1, 56)[0].tolist(), new % 8 + 5) for new in range(24)]
    ends = [replace(request, params=SamplingParams(seed=seed)) for seed, request in enumerate(ends)]
    requests = [*ends, *requests_of(model, (61, 120), new=12)]
    results = Engine(reader, num_drafts, decoded).generate(requests)
    texts = [[*request.tokens, *result.tokens] for request, result in zip(requests, results, strict=True)]
    Engine(reader, 0, read, prefill=50).generate([Request(text, 1) for text in texts])
    found = [decoded.find(text) for text in texts]
    counts = [0 if latents is None else latents.shape[1] // 64 for latents in found]
    assert 0 < sum(counts[:-2]) < 24 and counts[-2:] == [1, 2]
    for text, got in zip(texts, found, strict=True):
        if got is not None:
            wanted = read.find(text)
            assert wanted is not None
            torch.testing.assert_close(got, wanted[:, : got.shape[1]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_store", [False, True])
@pytest.mark.parametrize(("depth", "num_drafts"), [(3, 0), (2, 1), (1, 3)])
def test_a_cache_that_grows_by_no_more_than_it_must_is_large_enough(
    depth: int, num_drafts: int, with_store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_runtime.model.latent_cache._GROWS_BY", 0.0)
    model = draft_model(depth)
    store = open_prefix_cache(latent_form_of(model), 10**7) if with_store else None
    engine = Engine(InferenceModel(model), num_drafts, store, prefill=2)
    requests = requests_of(model, (5, 1))
    for batch in (requests, requests[:1], requests[1:]):
        if num_drafts:
            check_drafts(model, engine, batch)
        else:
            assert all(result.tokens for result in engine.generate(batch))
