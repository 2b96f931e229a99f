"""Comparisons: paired differences, tables, and foreign models measured by the same rule."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.data.vocabulary import EOS
from moe_runtime.errors import CheckpointError
from moe_runtime.evaluation.comparison import Column, Comparison, likelihood_rows, task_rows
from moe_runtime.evaluation.comparison_text import as_markdown
from moe_runtime.evaluation.documents import Text
from moe_runtime.evaluation.foreign_model import ForeignModel, context_of_folder
from moe_runtime.evaluation.task_items import ChoiceItem, read_items
from moe_runtime.evaluation.task_scores import ChoiceScore, choose, score_items
from moe_runtime.evaluation.windows import document_nats
from tests.unit.evaluation.samples import item_lines, small_bpe, stdlib_texts, write_items


def texts_of(sizes: list[int]) -> list[Text]:
    return [Text(f"doc {at}", "ab"[at % 2], "x" * size) for at, size in enumerate(sizes)]


def test_a_difference_that_every_document_shares_is_resolved_though_intervals_overlap() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(50, 500, 40)
    hard = draw.uniform(0.5, 3.0, 40) * sizes * math.log(2)
    total, *parts = likelihood_rows("set", texts_of(sizes.tolist()), [hard.tolist(), (hard * 0.98).tolist()])
    first, second = total.values
    assert first.low < second.mean < first.high
    (difference,) = total.differences
    assert difference.resolved and difference.mean == pytest.approx(-0.02 * first.mean)
    assert first.mean == pytest.approx(hard.sum() / math.log(2) / sizes.sum())
    assert [(row.part, row.count) for row in (total, *parts)] == [(None, 40), ("a", 20), ("b", 20)]


def test_rounding_is_no_difference_and_few_documents_resolve_none() -> None:
    nats = [100.0 + number for number in range(40)]
    (row, *_) = likelihood_rows("set", texts_of([100] * 40), [nats, [one * (1 + 1e-8) for one in nats]])
    assert row.differences[0].resolved and not row.resolves(row.differences[0])
    (row, *_) = likelihood_rows("set", texts_of([100] * 40), [nats, [one * 1.01 for one in nats]])
    assert row.resolves(row.differences[0])
    (row, *_) = likelihood_rows("set", texts_of([100] * 9), [nats[:9], [one * 1.01 for one in nats[:9]]])
    assert not row.resolves(row.differences[0])


def test_items_are_paired_too() -> None:
    item = ChoiceItem("f:1", "1", "", ("a", "b"), 0)
    right, wrong = (choose(item, lls, False) for lls in ([-1.0, -2.0], [-2.0, -1.0]))
    scores: list[list[ChoiceScore]] = [[right] * 6 + [wrong] * 14, [right] * 14 + [wrong] * 6]
    row = next(row for row in task_rows("f", scores) if row.metric == "acc")
    assert [one.mean for one in row.values] == [0.3, 0.7]
    assert row.differences[0].mean == pytest.approx(0.4) and row.differences[0].resolved


def test_the_table_says_what_it_compares_and_what_is_not_resolved() -> None:
    columns = tuple(Column(name, f"runs/{name}", "kind", 8, 1000) for name in ("one", "two"))
    rows = likelihood_rows("set", texts_of([100]), [[100.0], [90.0]])
    table = Comparison(columns, tuple(rows), "the rule", ("a note",))
    text = as_markdown(table)
    assert "| bits per byte, set | 1 document | 1.443 | 1.298 |" in text
    assert "| ... less one | | | -0.144 ? |" in text
    assert "- Rule of windows: the rule." in text and "- a note" in text
    said = json.loads(json.dumps(table.as_json(), allow_nan=False))
    assert said["rows"][0]["differences"] == [
        {"mean": pytest.approx(-10 / math.log(2) / 100), "low": None, "high": None, "resolved": False}
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of another family, with a small tokenizer that puts a mark before every text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("llama")
    backend = Tokenizer.from_str(small_bpe().to_json())
    start = backend.token_to_id("<|reserved_0|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|reserved_0|> $A", special_tokens=[("<|reserved_0|>", start)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|reserved_0|>", eos_token=EOS
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=48, initializer_range=0.3,
        bos_token_id=start, eos_token_id=backend.token_to_id(EOS),
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plainly(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each of the ids, by transformers alone: [ids, vocab]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_a_model_of_another_family_is_measured_by_the_same_windows(llama: Path) -> None:
    model = ForeignModel(llama, batch_tokens=100)
    assert model.context == context_of_folder(llama) == 48
    text = stdlib_texts()[0][:200]
    ids = [model.start_id, *model.encode(text, at_start=False)]
    assert model.start_id == model.encode(text, at_start=True)[0] and len(ids) > 49
    found = document_nats(model, [Text("a", ".", "x = 1"), Text("b", ".", text)], 48)[1]
    total, done = 0.0, 1
    for begin in range(0, len(ids), 24):
        window = ids[begin : begin + 49]
        logs = plainly(llama, window[:-1])
        for place in range(max(done, begin + 1), begin + len(window)):
            total -= float(logs[place - begin - 1, ids[place]])
        done = max(done, begin + len(window))
    assert found == pytest.approx(total, rel=1e-5)


def test_items_are_scored_with_it_one_at_a_time_or_together(llama: Path, tmp_path: Path) -> None:
    model = ForeignModel(llama)
    items = read_items(write_items(tmp_path / "items.jsonl", item_lines(4, 2)))
    for score in score_items(model, items):
        if isinstance(score, ChoiceScore) and score.item.context.strip():
            stripped = score.item.context.rstrip()
            rest = score.item.context[len(stripped) :]
            before = model.encode(stripped, at_start=True)
            for choice, value in zip(score.item.choices, score.log_likelihoods, strict=True):
                after = model.encode(stripped + rest + choice, at_start=True)[len(before) :]
                ids = [*before, *after][-49:]
                logs = plainly(llama, ids[:-1])[-len(after) :]
                assert value == pytest.approx(float(logs[range(len(after)), after].sum()), abs=1e-4)


@pytest.mark.parametrize("lacking", ["tokenizer", "weights", "tensor"])
def test_a_folder_that_is_not_whole_is_refused(llama: Path, lacking: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names: list[Any] = [
        one.name for one in llama.iterdir() if lacking != "tokenizer" or "tokenizer" not in one.name
    ]
    for name in names:
        if not (lacking == "weights" and name.endswith(".safetensors")):
            (tmp_path / name).write_bytes((llama / name).read_bytes())
    if lacking == "tensor":
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expected") as raised:
        ForeignModel(tmp_path)
    assert "\n" not in str(raised.value)
