"""Small models over bytes and over a BPE, and items made of the standard library's text."""

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, Checkpoint
from moe_runtime.config.schema import ModelConfig
from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.vocabulary import ByteTokenizer, Tokenizer
from moe_runtime.evaluation.our_model import OurModel
from moe_runtime.model.transformer import Transformer
from tests.unit.hugging_face.models import BASE, make_model, save

CONTEXT = 64  # batch.seq_len of the configs that `save` writes


def stdlib_texts() -> list[str]:
    """Texts of the package json."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def small_bpe() -> Tokenizer:
    """A BPE whose tokens cross the borders between words and white space."""
    return train_bpe(iter(stdlib_texts()), 420)


def small_model(tokenizer: Tokenizer) -> Transformer:
    """Random weights, wide enough that texts have quite different likelihoods."""
    return make_model(ModelConfig.model_validate(BASE | {"vocab_size": tokenizer.vocab_size}))


def wrapped(tokenizer: Tokenizer, **changes: Any) -> OurModel:
    """The same, ready for tasks."""
    return OurModel("small", small_model(tokenizer).eval(), tokenizer, **({"context": CONTEXT} | changes))


def saved(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
    """The same as a checkpoint."""
    return save(small_model(tokenizer), folder, {TOKENIZER_FILE: tokenizer.to_json().encode()})


def item_lines(choices: int = 20, targets: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Items: the true continuation of a text against others, and the next word as target; ragged all over."""
    draw = random.Random(seed)
    texts = [text for text in stdlib_texts() if len(text) > 3000]
    lines: list[dict[str, Any]] = []
    for number in range(choices):
        text = draw.choice(texts)
        place, length = draw.randrange(200, 2500), draw.randrange(1, 12)
        found = [text[place : place + length]]
        while len(found) < 2 + number % 3:
            other = draw.randrange(2500)
            found.append(draw.choice(texts)[other : other + draw.randrange(1, 12)])
        answer = draw.randrange(len(found))
        found[0], found[answer] = found[answer], found[0]
        context = text[place - draw.randrange(1, 80) : place]
        lines.append({"id": f"choice {number}", "context": context, "choices": found, "answer": answer})
    lines[0]["context"] = ""
    lines[1]["context"] += " \n"
    for number in range(targets):
        text, place = draw.choice(texts), draw.randrange(200, 2500)
        line: dict[str, Any] = {"id": f"target {number}", "context": text[place - 50 - 8 * number : place]}
        line |= {"target": text[place : place + 6], "max_tokens": 12}
        lines.append(line | ({"stop": ["\n", "e"]} if number % 2 else {}))
    return lines


def write_items(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def slow_log_likelihood(model: Transformer, ids: list[int], scored: int) -> float:
    """Of the last `scored` ids after the ones before them: one row, a whole forward."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0].double()
    logs = logits.log_softmax(-1)[-scored:]
    return float(logs[range(scored), ids[-scored:]].sum())


BYTES = ByteTokenizer()
