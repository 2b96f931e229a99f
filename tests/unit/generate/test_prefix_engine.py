"""The engine over a prefix cache answers as without one, and says how much of the prompt was found."""

from pathlib import Path

import pytest
import torch

from moe_runtime.generate.engine import Engine
from moe_runtime.generate.prefix_cache import PrefixCache, open_prefix_cache
from moe_runtime.generate.prefix_fingerprint import latent_form_of
from moe_runtime.generate.request import Continuation, Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.checkpoint.models import tiny_model
from tests.unit.model.samples import small_config, small_model

# FP64: no two logits are so close that another order of summation swaps them.
MODEL = tiny_model(1, torch.float64)
PROMPT = torch.randint(0, 40, (150,), generator=torch.Generator().manual_seed(0)).tolist()


def cache_in(folder: Path, model: Transformer = MODEL) -> PrefixCache:
    """A fresh cache, as a new process has it."""
    return open_prefix_cache(latent_form_of(model), 10**7, folder, 10**7)


def answer(
    prompt: list[int], drafts: int, store: PrefixCache | None, model: Transformer = MODEL
) -> Continuation:
    request = Request(prompt, 20, SamplingParams(temperature=1.0, seed=5))
    (result,) = Engine(InferenceModel(model), drafts, store, prefill=40).generate([request])
    return result


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_the_answer_is_the_same_from_a_folder_of_another_process(drafts: int, tmp_path: Path) -> None:
    plain = answer(PROMPT, drafts, None)
    first = answer(PROMPT, drafts, cache_in(tmp_path))
    again = answer(PROMPT, drafts, cache_in(tmp_path))
    assert plain.tokens == first.tokens == again.tokens
    assert (first.prompt_cache_hit_tokens, first.prompt_cache_miss_tokens) == (0, 150)
    assert (again.prompt_cache_hit_tokens, again.prompt_cache_miss_tokens) == (128, 22)
    assert again.accepted == plain.accepted


def test_keys_and_values_of_multi_head_attention_are_kept_as_latents_are(tmp_path: Path) -> None:
    model = small_model(small_config(attention="mha", mtp_depth=1, vocab_size=64))
    plain = answer(PROMPT, 1, None, model)
    for hits in (0, 128):
        found = answer(PROMPT, 1, cache_in(tmp_path, model), model)
        assert (found.tokens, found.prompt_cache_hit_tokens) == (plain.tokens, hits)


def test_a_known_prompt_leaves_its_last_token_and_a_longer_one_goes_on(
    tmp_path: Path,
) -> None:
    answer(PROMPT[:128], 1, cache_in(tmp_path))
    whole, longer = (answer(PROMPT[:length], 1, cache_in(tmp_path)) for length in (128, 150))
    assert (whole.prompt_cache_hit_tokens, longer.prompt_cache_hit_tokens) == (127, 128)
    assert whole.tokens == answer(PROMPT[:128], 1, None).tokens
    assert longer.tokens == answer(PROMPT, 1, None).tokens


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    answer(PROMPT, 0, cache_in(tmp_path))
    other = tiny_model(2, torch.float64)
    result = answer(PROMPT, 0, cache_in(tmp_path, other), other)
    assert result.prompt_cache_hit_tokens == 0 and result.tokens == answer(PROMPT, 0, None, other).tokens
