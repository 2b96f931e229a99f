"""Tokens drawn with drafts have the law of the main model alone, reckoned exactly from its forwards."""

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_runtime.generate import engine as engine_module
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.rejection import verify
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams, filtered_probs, pick
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.generate.goodness_of_fit import g_test_p_value
from tests.unit.generate.models import draft_model

VOCAB, NEW, ROWS, PROMPT = 4, 4, 3000, [1, 3, 0]
LAWS = {
    "temperature 1": SamplingParams(1.0),
    "top-k": SamplingParams(1.4, top_k=3),
    "top-p": SamplingParams(1.2, top_p=0.85),
}
# Seeds are fixed, so this fails always or never; a true law would fail one seed in a thousand.
LEAST = 1e-3


@cache
def model_of() -> Transformer:
    return draft_model(2, vocab_size=VOCAB, dtype=torch.float32)


def law(params: SamplingParams) -> Tensor:
    """Probability of each continuation by NEW tokens: float64 [VOCAB ** NEW]."""
    texts = torch.tensor([[*PROMPT, *more] for more in product(range(VOCAB), repeat=NEW)])
    with torch.no_grad():
        logits = model_of()(texts)[:, len(PROMPT) - 1 : -1].double()
    probs = filtered_probs(logits, params.temperature, params.top_k, params.top_p)
    return probs.gather(2, texts[:, len(PROMPT) :].unsqueeze(2)).squeeze(2).prod(dim=1)


def sample(num_drafts: int, params: SamplingParams) -> tuple[Tensor, float]:
    """How often each continuation came, int64 [VOCAB ** NEW], and the share of first drafts that stood."""
    requests = [
        Request(PROMPT, NEW, SamplingParams(params.temperature, params.top_k, params.top_p, seed))
        for seed in range(ROWS)
    ]
    results = Engine(InferenceModel(model_of()), num_drafts).generate(requests)
    tokens = torch.tensor([result.tokens for result in results])
    places = (tokens * VOCAB ** torch.arange(NEW - 1, -1, -1)).sum(dim=1)
    stood = sum(result.accepted[0] for result in results) / sum(result.drafted[0] for result in results)
    return places.bincount(minlength=VOCAB**NEW), stood


@pytest.mark.parametrize(
    ("num_drafts", "name"),
    [(1, "temperature 1"), (2, "temperature 1"), (3, "temperature 1"), (2, "top-k"), (3, "top-p")],
)
def test_four_tokens_together_have_the_models_own_law(num_drafts: int, name: str) -> None:
    counts, stood = sample(num_drafts, LAWS[name])
    assert 0.2 < stood < 0.95  # so that both ways, standing and refusal, are taken often
    assert g_test_p_value(counts, law(LAWS[name])) > LEAST


def never_from_the_remainder(
    target: Tensor, draft: Tensor, drafted: Tensor, accept_u: Tensor, pick_u: Tensor
) -> tuple[Tensor, Tensor]:
    """Wrong: after a refusal, draws from all of the target, which the drafts have had a share of."""
    accepted, _ = verify(target, draft, drafted, accept_u, pick_u)
    rows = torch.arange(len(accepted))
    return accepted, pick(target[rows, accepted], pick_u[rows, accepted])


def never_refusing(
    target: Tensor, draft: Tensor, drafted: Tensor, accept_u: Tensor, pick_u: Tensor
) -> tuple[Tensor, Tensor]:
    """Wrong: every draft stands."""
    accepted = torch.full((drafted.shape[0],), drafted.shape[1])
    return accepted, pick(target[:, -1], pick_u[:, -1])


@pytest.mark.parametrize("rule", [never_from_the_remainder, never_refusing])
def test_wrong_rules_of_acceptance_are_found_out(
    rule: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "verify", rule)
    counts, _ = sample(2, LAWS["temperature 1"])
    assert g_test_p_value(counts, law(LAWS["temperature 1"])) < 1e-6
