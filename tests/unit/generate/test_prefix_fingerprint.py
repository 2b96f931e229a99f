"""The fingerprint is the same for the same model, and another as soon as anything that matters is."""

from collections.abc import Callable

import pytest
import torch

from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.generate.prefix_fingerprint import LatentForm, fingerprint_of, latent_form_of
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.transformer import Transformer
from tests.unit.checkpoint.models import CONFIG, tiny_model


def next_float(model: Transformer, name: str) -> None:
    """Move the last element of a tensor to the next number."""
    tensor = model.state_dict()[name].flatten()
    tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(torch.inf))


def separate_documents(model: Transformer) -> None:
    model.document_separator = 3


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "a weight of the embedding": lambda model: next_float(model, "embed.weight"),
    "a weight of an expert": lambda model: next_float(model, "layers.1.moe.experts.down"),
    "a routing bias": lambda model: next_float(model, "layers.2.moe.router.bias"),
    "a weight of MTP": lambda model: next_float(model, "mtp.0.norm.weight"),
    "attention within documents": separate_documents,
    "products in FP8": lambda model: use_fp8(model, Policy(), WeightCasts()),
    "the dtype": lambda model: model.to(torch.bfloat16),
}


def test_the_same_weights_have_the_same_fingerprint_before_and_after_use() -> None:
    model, again = tiny_model(1), tiny_model(1)
    before = fingerprint_of(model)
    model(torch.arange(12).reshape(1, -1))
    assert before == fingerprint_of(model) == fingerprint_of(again)
    assert len(before) == 64 and before != fingerprint_of(tiny_model(2))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_fingerprint(change: str) -> None:
    model = tiny_model(1)
    before = fingerprint_of(model)
    CHANGES[change](model)
    assert fingerprint_of(model) != before


@pytest.mark.parametrize("with_files", [False, True])
def test_a_constant_of_the_config_is_part_of_it(with_files: bool) -> None:
    files = {"weights.safetensors": "00"} if with_files else None
    model = tiny_model(1)
    other = Transformer(CONFIG.model.model_validate(CONFIG.model.model_dump() | {"rope_theta": 10001.0}))
    other.load_state_dict(model.state_dict())
    assert fingerprint_of(other, files) != fingerprint_of(model, files)


def test_with_files_their_digests_stand_for_the_weights() -> None:
    model, other = tiny_model(1), tiny_model(2)
    files = {"weights-0.safetensors": "aa", "weights-1.safetensors": "bb"}
    assert fingerprint_of(model, files) == fingerprint_of(other, dict(reversed(files.items())))
    assert fingerprint_of(model, files) != fingerprint_of(model, files | {"weights-1.safetensors": "cc"})
    assert fingerprint_of(model, files) != fingerprint_of(model)


def test_the_form_of_latents_is_that_of_the_model() -> None:
    model = tiny_model(1, torch.bfloat16)
    expected = LatentForm(fingerprint_of(model), num_layers=4, width=12, dtype=torch.bfloat16)
    assert latent_form_of(model) == expected
