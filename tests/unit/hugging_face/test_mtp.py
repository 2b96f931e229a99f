"""Speculation by transformers' own MTP drafts, on what we export, gives our tokens and our acceptance."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.config.schema import ModelConfig
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.hugging_face.models import BASE, load_peer, save

candidates = pytest.importorskip("transformers.generation.candidate_generator")
if not hasattr(candidates, "MTPCandidateGenerator"):
    pytest.skip("this transformers does not draft with MTP", allow_module_level=True)

NEW, VOCAB, STEPS = 20, 48, 36


def text_of(generator: torch.Generator, sequences: int, length: int) -> Tensor:
    """Tokens that follow from the two before them, a tenth of them drawn anew: int64 [sequences, length]."""
    text = torch.randint(VOCAB, (sequences, length), generator=generator)
    for at in range(2, length):
        follows = torch.rand(sequences, generator=generator) < 0.9
        text[:, at] = torch.where(follows, (text[:, at - 1] * 5 + text[:, at - 2] // 8) % VOCAB, text[:, at])
    return text


@cache
def trained_model(depth: int) -> Transformer:
    """A model after a few seconds of training: its drafts stand often, not always."""
    config = ModelConfig.model_validate(BASE | {"mtp_depth": depth, "vocab_size": VOCAB, "init_std": 0.1})
    model = Transformer(config)
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        losses = model.losses(text_of(generator, 16, 16))
        optimizer.zero_grad()
        (losses.loss + 0.3 * losses.loss_mtp).backward()
        optimizer.step()
    return model


@contextmanager
def matches_of_passes(seen: list[int]) -> Iterator[None]:
    """Writes into `seen` how many drafts stood at each pass of the peer."""
    told = candidates.MTPCandidateGenerator.update_candidate_strategy

    def watched(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        seen.append(num_matches)
        told(self, input_ids, scores, num_matches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates.MTPCandidateGenerator, "update_candidate_strategy", watched)
        yield


def peers_answer(peer: nn.Module, prompt: list[int]) -> tuple[list[int], list[int]]:
    """New tokens of transformers' greedy speculation, and how many drafts stood at each pass."""
    passes: list[int] = []
    text = torch.tensor([prompt])
    with torch.no_grad(), matches_of_passes(passes):
        tokens = peer.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=NEW, do_sample=False, use_mtp=True
        )
    return tokens[0, len(prompt) :].tolist(), passes


def our_answer(engine: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """The same of ours; the prompt's pass has no drafts."""
    decoding = engine.start([Request(prompt, NEW, SamplingParams(temperature=0.0))])
    passes = [len(piece.tokens) - 1 for piece in decoding]
    return decoding.results[0].tokens, passes


@pytest.mark.parametrize("num_prompts", [8, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_speculates_to_our_tokens_with_our_acceptance(
    depth: int, num_prompts: int, tmp_path: Path
) -> None:
    model = trained_model(depth)
    export_model(save(model, tmp_path / "run"), tmp_path / "hub", ExportOptions())
    layers = model.config.num_layers
    peer = load_peer(tmp_path / "hub", layers)
    # transformers finds MTP layers by the names that it is told to leave out; it knows those of V3's depth.
    peer._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers + d}\..*" for d in range(depth)]
    engine = Engine(InferenceModel(model), num_drafts=depth)
    generator = torch.Generator().manual_seed(7)
    accepted = [0] * (depth + 1)
    for number in range(num_prompts):
        # transformers (5.23) fails on prompts shorter than the depth whose first draft is refused.
        prompt = text_of(generator, 1, depth + number % 20)[0].tolist()
        ours, theirs = our_answer(engine, prompt), peers_answer(peer, prompt)
        assert ours == theirs
        for stood in ours[1][1:]:
            accepted[stood] += 1
    assert all(count > num_prompts for count in accepted), accepted
