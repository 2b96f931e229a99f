"""Losses by document and by source against a loop that looks at one token after the other."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.evaluation.loss import evaluate
from moe_runtime.evaluation.tally import Tally, by_part
from tests.unit.evaluation.samples import BYTES, small_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("sets")
    for number in range(24):
        part = folder / "texts" / ("abc"[number % 3] if number % 4 else "")
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{number}.txt").write_text(f"text {number} é" * (1 + number % 5))
    prepare(Request(f"dir:{folder / 'texts'}", "byte", 0, 0.0, 0.45), folder / "data")
    return TokenDataset.open(folder / "data", "validation")


@pytest.mark.parametrize("sequences", [3, 1000])
def test_every_token_is_counted_in_its_document(dataset: TokenDataset, sequences: int) -> None:
    model = small_model(BYTES).eval()
    loader = BatchLoader(dataset, 16, 1, seed=4)
    found = evaluate(model, loader, sequences, 4)
    starts = dataset.document_starts().astype(np.int64).tolist()
    slow = Tally.empty(len(starts) - 1)
    for number in range(min(sequences, loader.samples_per_epoch)):
        row, start = loader.sequences(number, 1)[:, :17], int(loader.starts([number])[0])
        with torch.no_grad():
            logs = model(row[:, :-1])[0].double().log_softmax(-1)
        for place in range(16):
            token, position = int(row[0, place + 1]), start + place + 1
            if position >= dataset.num_tokens:
                continue
            document = next(at for at, end in enumerate(starts[1:]) if position < end)
            slow.nats[document] -= float(logs[place, token])
            slow.tokens[document] += 1
            slow.bytes[document] += token < 256
    assert np.allclose(found.nats, slow.nats, rtol=1e-5)
    assert (found.tokens == slow.tokens).all() and (found.bytes == slow.bytes).all()
    if sequences >= loader.samples_per_epoch:  # each once; nothing stands before the first
        assert found.tokens.sum() == dataset.num_tokens - 1


def test_tokens_that_are_no_targets_are_read_and_not_counted(tmp_path: Path) -> None:
    lines = [{"text": f"ask {number}? tell {number}!", "loss_spans": [[8, 12]]} for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(Request(str(tmp_path / "a.jsonl"), validation_fraction=0.45), tmp_path / "data")
    masked = BatchLoader(TokenDataset.open(tmp_path / "data", "validation"), 16, 0, seed=4)
    model = small_model(BYTES).eval()
    found, nats, targets = evaluate(model, masked, 1000, 4), 0.0, 0
    for row, start in zip(
        masked.sequences(0, masked.samples_per_epoch),
        masked.starts(range(masked.samples_per_epoch)),
        strict=True,
    ):
        ids = torch.where(row < 0, -1 - row, row)
        with torch.no_grad():
            logs = model(ids[None, :-1])[0].double().log_softmax(-1)
        for place in range(16):
            if row[place + 1] >= 0 and start + place + 1 < masked.dataset.num_tokens:
                nats, targets = nats - float(logs[place, row[place + 1]]), targets + 1
    result = found.result()
    assert result.tokens == targets == 4 * masked.dataset.record.documents == result.bytes
    assert result.loss == pytest.approx(nats / targets, rel=1e-5)


def test_sources_add_up_to_the_set_and_are_named_by_folder(dataset: TokenDataset) -> None:
    tally = evaluate(small_model(BYTES).eval(), BatchLoader(dataset, 16, 1, seed=4), 1000, 4)
    parts = by_part(tally, *dataset.document_parts())
    assert list(parts) == sorted(parts) and set(parts) <= {".", "a", "b", "c"} and len(parts) > 1
    total = tally.result()
    assert sum(one.result().tokens for one in parts.values()) == total.tokens
    nats = sum(one.result().loss * one.result().tokens for one in parts.values())
    assert nats == pytest.approx(total.loss * total.tokens)
    assert total.perplexity == pytest.approx(math.exp(total.loss))
    assert total.bits_per_byte == pytest.approx(total.loss * total.tokens / math.log(2) / total.bytes)
    assert total.bits_per_byte_low < total.bits_per_byte < total.bits_per_byte_high


def test_a_single_document_has_no_interval() -> None:
    tally = Tally.empty(3)
    tally.add(np.array([1, 1]), np.array([1.0, 2.0]), np.array([1, 1]))
    result = tally.result()
    assert (result.documents, result.tokens, result.loss) == (1, 2, 1.5)
    assert math.isnan(result.bits_per_byte_low) and result.bits_per_byte == pytest.approx(1.5 / math.log(2))
