"""What a tokenizer is, and the byte tokenizer.

Every id stands for a fixed string of bytes, and control ids (end of document, infill marks) for
none. That makes loss comparable over tokenizers: bits per byte = nats / ln 2 / bytes predicted.
Control ids never come from text: a document that spells a mark out is encoded as plain text.
"""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]

# Specials of the tokenizers we make ourselves, in this order.
EOS = "<|eos|>"
FIM_MARKS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
RESERVED = ("<|pad|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
SPECIALS = (EOS, *FIM_MARKS, *RESERVED)


class FimIds(NamedTuple):
    """Ids that mark prefix, suffix and middle of a rewritten document. Ref: DSV3 §4.1."""

    begin: int
    hole: int
    end: int


class Tokenizer(Protocol):
    """What data, evaluation and generation need of a tokenizer.

    Attributes:
        name: as the user spells it: byte, bpe:N, deepseek or a path.
        vocab_size: largest id + 1.
        eos_id: ends every document.
        fim: infill marks; None if the vocabulary has none.
        id_bytes: the bytes of each id, b"" for control ids; vocab_size entries.
    """

    name: str
    vocab_size: int
    eos_id: int
    fim: FimIds | None
    id_bytes: Sequence[bytes]

    def encode(self, text: str) -> Ids:
        """Ids of `text`, int64 [tokens]; adds no control ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The same for many texts at once, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids: never fails; broken UTF-8 becomes U+FFFD, unknown and control ids nothing."""
        ...

    def to_json(self) -> str:
        """The whole tokenizer as one JSON text, read back by `tokenizer_from_json`."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256..263 are control ids: 264 in all.

    Bytes that are not UTF-8 survive as Python's surrogate escapes (as in arguments and file names);
    any other lone surrogate, which no encoding has, becomes U+FFFD.
    """

    name = "byte"
    vocab_size = 256 + len(SPECIALS)
    eos_id = 256
    fim: FimIds | None = FimIds(257, 258, 259)

    def __init__(self) -> None:
        self.id_bytes: Sequence[bytes] = [bytes([value]) for value in range(256)] + [b""] * len(SPECIALS)

    def encode(self, text: str) -> Ids:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raw = scalar_text(text).encode()
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_bytes(self, ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"type": "moe_runtime byte", "specials": list(SPECIALS)}, indent=1)


def decode_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """The exact bytes of `ids`; ids outside the vocabulary and control ids stand for none."""
    table, size = tokenizer.id_bytes, tokenizer.vocab_size
    return b"".join(table[i] for i in ids if 0 <= i < size)


def byte_lengths(tokenizer: Tokenizer) -> Ids:
    """Bytes that each id stands for, int64 [vocab_size]; 0 for control ids."""
    return np.array([len(piece) for piece in tokenizer.id_bytes], dtype=np.int64)


def scalar_text(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
