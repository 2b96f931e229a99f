"""Tokens read into a latent cache, piece by piece, give the logits of a forward over all of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.latent_attention import LatentAttention
from moe_runtime.model.latent_cache import LatentCache
from moe_runtime.model.local_experts import LocalExperts
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import F64, draw_tokens, small_config, small_model

SEPARATOR = 5
GROUPED = {"expert_ffn_size": 8}  # rows of whole 16 bytes, which grouped products ask for
YARN = {"factor": 4.0, "original_seq_len": 16}
CASES: dict[str, dict[str, Any]] = {
    "groups, q latent": GROUPED,
    "full queries, no dense layer, no shared experts": {
        "q_lora_rank": None,
        "num_dense_layers": 0,
        "num_shared_experts": 0,
        **GROUPED,
    },
    "two dense layers, one group, experts by the dispatcher": {
        "num_dense_layers": 2,
        "num_groups": 1,
        "num_groups_kept": 1,
    },
    "values wider than keys, all layers dense": {"v_head_dim": 12, "num_dense_layers": 3},
    "YaRN, positions beyond the original length": {"yarn": YARN, **GROUPED},
    "documents": {"separator": SEPARATOR, **GROUPED},
    "multi-head attention": {"attention": "mha", **GROUPED},
    "multi-head attention, documents": {"attention": "mha", "separator": SEPARATOR, **GROUPED},
    "multi-head attention, values wider than keys": {"attention": "mha", "v_head_dim": 12},
}
# Tokens of each pass: 87 in all. A row shifts the order by its number, so the others are ragged to it.
PIECES = (1, 1, 2, 7, 64, 1, 2, 2, 7)
LENGTHS = (87, 50, 1, 75)
# Largest difference, by the range of the logits: sums in another order.
CLOSE = {F64: 1e-13, torch.float32: 3e-6}


def model_of(case: str, dtype: torch.dtype = F64) -> Transformer:
    changes = dict(CASES[case])
    separator = changes.pop("separator", None)
    return small_model(small_config(**changes), dtype=dtype, document_separator=separator)


def sequences(config: ModelConfig, lengths: Sequence[int]) -> list[Tensor]:
    """Tokens with some separators among them: first, last, and two side by side."""
    rows = [draw_tokens(config, 1, length, seed=length)[0] for length in lengths]
    for row in rows:
        row[[place for place in (0, 9, 10, 41) if place < len(row) - 1] + [-1]] = SEPARATOR
    return rows


@torch.no_grad()
def whole(model: Transformer, row: Tensor) -> Tensor:
    """The oracle: logits [length, vocab] of one forward."""
    return model(row.unsqueeze(0))[0]


def read(model: InferenceModel, cache: LatentCache, rows: Sequence[Tensor]) -> list[Tensor]:
    """Append tokens to each row, some perhaps none: logits [count, vocab] of each."""
    counts = torch.tensor([len(row) for row in rows])
    window = torch.full((len(rows), int(counts.max())), 7)
    for line, row in zip(window, rows, strict=True):
        line[: len(row)] = row
    logits = model.logits(model.read(cache, window, counts))
    return list(logits.split(counts.tolist()))


def read_in_pieces(
    model: InferenceModel, cache: LatentCache, rows: Sequence[Tensor], pieces: Sequence[int] = PIECES
) -> list[Tensor]:
    """Logits [length, vocab] of each row, read in unlike pieces, until the longest has ended."""
    begun, out = [0] * len(rows), [[] for _ in rows]
    turn = 0
    while any(start < len(row) for start, row in zip(begun, rows, strict=True)):
        sizes = [pieces[(turn + number) % len(pieces)] for number in range(len(rows))]
        parts = [row[at : at + size] for row, at, size in zip(rows, begun, sizes, strict=True)]
        for number, logits in enumerate(read(model, cache, parts)):
            out[number].append(logits)
            begun[number] += len(logits)
        turn += 1
    return [torch.cat(parts) for parts in out]


def assert_near(got: Tensor, wanted: Tensor) -> None:
    spread = float(wanted.max() - wanted.min())
    assert float((got - wanted).abs().max()) <= CLOSE[got.dtype] * spread


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_logits_of_one_forward(case: str, dtype: torch.dtype) -> None:
    model = model_of(case, dtype)
    rows = sequences(model.config, LENGTHS)
    wanted = [whole(model, row) for row in rows]
    reader = InferenceModel(model)
    (alone,) = read_in_pieces(reader, reader.new_cache(1, 1), rows[:1])
    assert_near(alone, wanted[0])
    batch = read_in_pieces(reader, reader.new_cache(len(rows), 1), rows)
    for got, logits in zip(batch, wanted, strict=True):
        assert_near(got, logits)


@pytest.mark.parametrize(("width", "attention"), [(7, "mla"), (8, "mla"), (8, "mha")])
def test_bf16_strays_no_further_from_exact_logits_than_one_forward_does(width: int, attention: str) -> None:
    # A rounding may send a token to another expert, so single logits have no bound; their mean has.
    config = small_config(expert_ffn_size=width, attention=attention)
    model, exact = small_model(config, dtype=torch.bfloat16), small_model(config)
    exact.load_state_dict(model.state_dict())
    rows = sequences(config, LENGTHS)
    reader = InferenceModel(model)
    wanted = torch.cat([whole(exact, row) for row in rows])
    plain = torch.cat([whole(model, row) for row in rows])
    got = torch.cat(read_in_pieces(reader, reader.new_cache(len(rows), 1), rows))
    error, usual = ((logits - wanted).square().mean().sqrt() for logits in (got, plain))
    assert error < 1.25 * usual < 0.02 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_absorbed_and_lifted_attention_give_the_same(
    rows: int, separator: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(document_separator=separator)
    texts = sequences(model.config, LENGTHS[:rows])
    reader, found = InferenceModel(model), []
    for lifts in (False, True):
        monkeypatch.setattr(LatentAttention, "_lifts", lambda self, reach, lifts=lifts: lifts)
        found.append(torch.cat(read_in_pieces(reader, reader.new_cache(rows, 1), texts)))
    assert_near(found[0], found[1])
    assert_near(found[0], torch.cat([whole(model, text) for text in texts]))


def test_both_forms_of_attention_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    reckon = LatentAttention._lifts

    def watched(self: LatentAttention, reach: Any) -> bool:
        chosen.append(reckon(self, reach))
        return chosen[-1]

    monkeypatch.setattr(LatentAttention, "_lifts", watched)
    reader = InferenceModel(small_model(small_config(kv_lora_rank=16)))
    cache = reader.new_cache(1, 1)
    reader.read(cache, draw_tokens(reader.config, 1, 64))
    assert set(chosen) == {True}
    reader.read(cache, draw_tokens(reader.config, 1, 1))
    assert not chosen[-1]


def test_experts_here_give_what_the_dispatcher_gives() -> None:
    model = small_model(small_config(**GROUPED), dtype=torch.float32)
    rows = sequences(model.config, LENGTHS)
    reader = InferenceModel(model)
    layers = [layer for layer in reader._layers if layer.moe is not None]
    assert len(layers) == 2 and all(isinstance(layer.experts, LocalExperts) for layer in layers)
    here = torch.cat(read_in_pieces(reader, reader.new_cache(len(rows), 1), rows))
    for layer in layers:
        layer.experts = None
    there = torch.cat(read_in_pieces(reader, reader.new_cache(len(rows), 1), rows))
    assert_near(here, there)


@pytest.mark.parametrize(("dtype", "width"), [(F64, 8), (torch.float32, 7), (torch.bfloat16, 12)], ids=str)
def test_experts_that_no_grouped_product_serves_go_by_the_dispatcher(dtype: torch.dtype, width: int) -> None:
    reader = InferenceModel(small_model(small_config(expert_ffn_size=width), dtype=dtype))
    assert all(layer.experts is None for layer in reader._layers)


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_tokens_taken_back_leave_nothing(separator: int | None) -> None:
    model = small_model(document_separator=separator)
    texts = sequences(model.config, (30, 21))
    reader = InferenceModel(model)
    for rows in (texts[:1], texts):
        cache = reader.new_cache(len(rows), 1)
        read_in_pieces(reader, cache, rows)
        keep = torch.tensor([11, 20][: len(rows)])  # in the midst of separators, and all but one
        cache.lengths = keep.clone()
        others = [row.flip(0)[: 5 + i] for i, row in enumerate(rows)]
        for got, row, stays, more in zip(read(reader, cache, others), rows, keep, others, strict=True):
            assert_near(got, whole(model, torch.cat((row[:stays], more)))[stays:])


def test_kept_rows_go_on_in_their_new_order() -> None:
    model = small_model()
    rows = sequences(model.config, (20, 13, 17))
    reader = InferenceModel(model)
    cache = reader.new_cache(3, 4)
    read(reader, cache, [row[:-3] for row in rows])
    cache.keep(torch.tensor([2, 0]))
    assert (cache.rows, cache.lengths.tolist()) == (2, [14, 17])
    for row, got in zip((rows[2], rows[0]), read(reader, cache, [rows[2][-3:], rows[0][-3:]]), strict=True):
        assert_near(got, whole(model, row)[-3:])
    cache.keep(torch.tensor([1]))
    (got,) = read(reader, cache, [rows[1]])
    assert_near(got, whole(model, torch.cat((rows[0], rows[1])))[20:])


def test_a_beginning_that_is_known_is_not_read() -> None:
    model = small_model()
    (row,) = sequences(model.config, (25,))
    reader = InferenceModel(model)
    first, second = reader.new_cache(1, 4), reader.new_cache(2, 4)
    read(reader, first, [row])
    second.fill(1, first.latents[:, 0, :18], row[:18])
    _, got = read(reader, second, [row, row[18:]])
    assert_near(got, whole(model, row)[18:])


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_the_cache_holds_latents_alone_and_grows_as_needed(dtype: torch.dtype) -> None:
    reader = InferenceModel(small_model(dtype=dtype))
    config = reader.config
    cache = reader.new_cache(2, 3)
    layers = config.num_layers + config.mtp_depth
    one = (config.kv_lora_rank + config.qk_rope_head_dim) * torch.empty(0, dtype=dtype).element_size()
    assert cache.bytes_per_token == layers * one
    assert cache.latents.numel() * cache.latents.element_size() == 2 * 3 * layers * one
    cache.latents.fill_(1.0)
    cache.reserve(3)
    assert cache.slots == 3
    cache.reserve(4)
    assert cache.slots == 4 and cache.latents.dtype == dtype
    assert bool((cache.latents[:, :, :3] == 1).all()) and not bool(cache.latents[:, :, 3:].any())
    reader.read(cache, torch.zeros(2, 20, dtype=torch.int64))
    assert cache.slots == 20 == cache.latents.shape[2]
    cache.reserve(21)
    assert cache.slots == 30  # half as much again, so that a token a pass is not a copy a pass
