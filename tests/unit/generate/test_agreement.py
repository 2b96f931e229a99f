"""Where BF16 decodings part, the plain decoder was nearly undecided; the gap of any other parting is wide."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from moe_runtime.generate.agreement import BF16_TOLERANCE, Parting, partings
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.request import Continuation, Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.generate.models import draft_model
from tests.unit.model.samples import draw_tokens

NEW, REQUESTS = 16, 32


@cache
def model_of(dtype: torch.dtype = torch.bfloat16) -> Transformer:
    return draft_model(2, vocab_size=64, dtype=dtype)


def requests_of() -> list[Request]:
    config = model_of().config
    prompts = [draw_tokens(config, 1, 5, seed=seed)[0].tolist() for seed in range(REQUESTS)]
    return [Request(prompt, NEW, SamplingParams(temperature=0.0)) for prompt in prompts]


@cache
def plain() -> tuple[Continuation, ...]:
    return tuple(Engine(InferenceModel(model_of())).generate(requests_of()))


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_speculation_in_bf16_parts_from_plain_decoding_at_near_ties_alone(num_drafts: int) -> None:
    model = InferenceModel(model_of())
    drafted = Engine(model, num_drafts).generate(requests_of())
    found = partings(model, requests_of(), plain(), drafted)
    assert all(parting.gap <= BF16_TOLERANCE for parting in found)
    assert len(found) <= REQUESTS // 4


def test_whole_forwards_in_bf16_part_from_plain_decoding_at_near_ties_alone() -> None:
    tokens = torch.tensor([list(request.tokens) for request in requests_of()])
    for _ in range(NEW):
        with torch.no_grad():
            best = model_of()(tokens)[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    whole = [Continuation(row) for row in tokens[:, -NEW:].tolist()]
    found = partings(InferenceModel(model_of()), requests_of(), plain(), whole)
    # Attention in the lifted form rounds elsewhere: on a CPU this, unlike drafts, does lead to other texts.
    assert 0 < len(found) <= REQUESTS // 4
    assert all(parting.gap <= BF16_TOLERANCE for parting in found)


def test_another_model_parts_where_the_choice_was_clear() -> None:
    other = draft_model(2, vocab_size=64, dtype=torch.bfloat16, rope_theta=50.0)
    found = partings(
        InferenceModel(model_of()),
        requests_of(),
        plain(),
        Engine(InferenceModel(other)).generate(requests_of()),
    )
    assert sum(parting.gap > 2 * BF16_TOLERANCE for parting in found) > REQUESTS // 4


def test_gaps_are_those_of_the_first_difference() -> None:
    model = model_of(torch.float64)
    reader = InferenceModel(model)
    request = replace(requests_of()[0], stop_ids=frozenset({3}))
    (result,) = Engine(reader).generate([replace(request, stop_ids=frozenset())])
    with torch.no_grad():
        logits = model(torch.tensor([[*request.tokens, *result.tokens]]))[0, len(request.tokens) - 1 + 4]
    best, range_ = float(logits.max()), float(logits.max() - logits.min())
    swapped = Continuation([*result.tokens[:4], 7, *result.tokens[5:]])
    stopped = Continuation(result.tokens[:4])
    assert partings(reader, [request], [result], [result]) == []
    for other, token in ((swapped, 7), (stopped, 3)):
        assert int(logits.argmax()) != token
        gap = pytest.approx((best - float(logits[token])) / range_)
        assert partings(reader, [request], [result], [other]) == [Parting(0, 4, gap)]
