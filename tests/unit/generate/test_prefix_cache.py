"""What is found is what was stored under the same beginning, whatever the order, the place and the bound."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS
from moe_runtime.generate.prefix_cache import PrefixCache, open_prefix_cache
from moe_runtime.generate.prefix_fingerprint import LatentForm
from tests.unit.generate.prefix_samples import (
    BLOCK_BYTES,
    FORM,
    block_files,
    cache_of,
    latents_of,
    learn,
    text_of,
    tier_of,
    true_blocks,
)

KINDS = pytest.mark.parametrize("kind", ["memory", "disk"])
words = st.lists(st.integers(0, 2), max_size=5)
operations = st.lists(st.tuples(st.booleans(), words, st.integers(0, 63)), max_size=16)


@KINDS
def test_only_whole_blocks_are_kept_and_found(kind: str, tmp_path: Path) -> None:
    cache = cache_of(kind, tmp_path)
    learn(cache, text_of(1, 2, tail=63), text_of(tail=63))
    assert true_blocks(cache, text_of(1, 2)) == 2
    assert true_blocks(cache, text_of(1, 2, 3, tail=5)) == 2
    assert true_blocks(cache, text_of(1, 2)[:-1]) == 1
    assert true_blocks(cache, text_of(1)[:-1]) == 0
    assert true_blocks(cache, []) == 0


@KINDS
def test_a_block_is_found_after_its_own_beginning_alone(kind: str, tmp_path: Path) -> None:
    cache = cache_of(kind, tmp_path)
    learn(cache, text_of(1, 2, 3), text_of(4, 2))
    assert true_blocks(cache, text_of(2, 3)) == 0
    assert true_blocks(cache, text_of(4, 2, 3)) == 2
    assert true_blocks(cache, text_of(1, 3)) == 1
    assert true_blocks(cache, [0, *text_of(1, 2, 3)]) == 0


@pytest.mark.parametrize(
    "other",
    [
        LatentForm("cd" * 32, FORM.num_layers, FORM.width, FORM.dtype),
        LatentForm(FORM.fingerprint, FORM.num_layers + 1, FORM.width, FORM.dtype),
        LatentForm(FORM.fingerprint, FORM.width, FORM.num_layers, FORM.dtype),
        LatentForm(FORM.fingerprint, FORM.num_layers, FORM.width, torch.float16),
        LatentForm(FORM.fingerprint, FORM.num_layers, FORM.width, torch.float32),
    ],
    ids=["fingerprint", "layers", "transposed", "float16", "float32"],
)
def test_another_model_finds_nothing_in_the_same_folder(other: LatentForm, tmp_path: Path) -> None:
    learn(cache_of("disk", tmp_path), text_of(1, 2))
    assert cache_of("disk", tmp_path, form=other).find(text_of(1, 2)) is None


def find_in(oracle: dict[tuple[int, ...], Tensor], tokens: list[int]) -> Tensor | None:
    """The slow way: the longest beginning of whole blocks among all that were stored."""
    for end in range(len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS, 0, -BLOCK_TOKENS):
        if tuple(tokens[:end]) in oracle:
            return oracle[tuple(tokens[:end])]
    return None


def run_beside_oracle(cache: PrefixCache, steps: list[tuple[bool, list[int], int]]) -> None:
    oracle: dict[tuple[int, ...], Tensor] = {}
    for is_store, path, tail in steps:
        tokens = text_of(*path, tail=tail)
        if is_store:
            cache.store(tokens, latents_of(tokens))
            for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
                oracle[tuple(tokens[:end])] = latents_of(tokens)[:, :end]
            continue
        found, expected = cache.find(tokens), find_in(oracle, tokens)
        assert (found is None) == (expected is None)
        assert found is None or expected is None or torch.equal(found, expected)


@given(operations)
@settings(max_examples=40, deadline=None)
def test_a_cache_with_room_agrees_with_a_dictionary_of_all_prefixes(
    steps: list[tuple[bool, list[int], int]],
) -> None:
    with TemporaryDirectory() as folder:
        run_beside_oracle(cache_of("memory", Path(folder)), steps)
        run_beside_oracle(cache_of("disk", Path(folder)), steps)


@given(operations)
@settings(max_examples=20, deadline=None)
def test_memory_over_disk_agrees_with_it_though_memory_holds_two_blocks(
    steps: list[tuple[bool, list[int], int]],
) -> None:
    with TemporaryDirectory() as folder:
        tiers = [tier_of("memory", Path(folder), 2), tier_of("disk", Path(folder), 1000)]
        run_beside_oracle(PrefixCache(FORM, tiers), steps)


@KINDS
@given(steps=operations, num_blocks=st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_a_bound_holds_after_every_step_and_the_latest_text_is_kept_from_its_beginning(
    kind: str, steps: list[tuple[bool, list[int], int]], num_blocks: int
) -> None:
    with TemporaryDirectory() as folder:
        tier = tier_of(kind, Path(folder), num_blocks)
        cache = PrefixCache(FORM, [tier])
        for is_store, path, tail in steps:
            text = text_of(*path, tail=tail)
            if is_store:
                learn(cache, text)
                assert true_blocks(cache, text) == min(len(path), num_blocks)
            else:
                true_blocks(cache, text)
            held = getattr(tier, "num_bytes", sum(file.stat().st_size for file in block_files(Path(folder))))
            assert held <= num_blocks * BLOCK_BYTES[kind]


@KINDS
def test_the_least_recently_used_goes_first(kind: str, tmp_path: Path) -> None:
    cache = cache_of(kind, tmp_path, num_blocks=3)
    learn(cache, text_of(1), text_of(2), text_of(3))
    assert true_blocks(cache, text_of(1)) == 1  # so 2 is the oldest now
    learn(cache, text_of(4))
    assert [true_blocks(cache, text_of(word)) for word in (2, 1, 3, 4)] == [0, 1, 1, 1]


@KINDS
@pytest.mark.parametrize("num_others", [1, 2, 3])
@pytest.mark.parametrize("found_before", [False, True])
def test_of_one_text_the_end_goes_first(
    kind: str, found_before: bool, num_others: int, tmp_path: Path
) -> None:
    cache = cache_of(kind, tmp_path, num_blocks=4)
    learn(cache, text_of(1, 2, 3, 4))
    if found_before:
        assert true_blocks(cache, text_of(1, 2, 3, 4)) == 4
    learn(cache, *(text_of(5 + other) for other in range(num_others)))
    assert true_blocks(cache, text_of(1, 2, 3, 4)) == 4 - num_others


def test_a_stored_text_does_not_change_with_the_tensor_it_came_from_nor_with_what_was_found() -> None:
    cache = open_prefix_cache(FORM, 10**6)
    text, latents = text_of(1), latents_of(text_of(1))[:, :BLOCK_TOKENS].clone()
    cache.store(text, latents)
    latents.zero_()
    found = cache.find(text)
    assert found is not None
    found.zero_()
    assert true_blocks(cache, text) == 1


def test_memory_takes_what_the_disk_has_and_then_does_without_it(tmp_path: Path) -> None:
    learn(open_prefix_cache(FORM, 10**6, tmp_path, 10**6), text_of(1, 2))
    cache = open_prefix_cache(FORM, 10**6, tmp_path, 10**6)
    assert true_blocks(cache, text_of(1, 2, 3)) == 2
    for file in block_files(tmp_path):
        file.unlink()
    assert true_blocks(cache, text_of(1, 2)) == 2
    assert cache.statistics() == {
        "lookups": 2,
        "hit_tokens": 256,
        "miss_tokens": 64,
        "memory": {"hits": 2, "stored": 2, "evicted": 0, "damaged": 0},
        "disk": {"hits": 2, "stored": 0, "evicted": 0, "damaged": 0},
    }


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(3, 127, 5, dtype=torch.bfloat16),
        torch.zeros(2, 128, 5, dtype=torch.bfloat16),
        torch.zeros(3, 128, 6, dtype=torch.bfloat16),
        torch.zeros(3, 128, 5),
    ],
    ids=["too few slots", "layers", "width", "dtype"],
)
def test_latents_of_another_form_are_refused(latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"latents: expected torch\.bfloat16 \[3, at least 128, 5\], got"):
        open_prefix_cache(FORM, 10**6).store(text_of(1, 2), latents)
