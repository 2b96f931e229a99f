"""Losses counted by document: the base of every figure by source, and of its interval.

A predicted token belongs to the document that it lies in; the id that ends a document is its last token.
Windows over packed text begin and end in mid-document, so a document may be counted in part: its nats, tokens
and bytes are of what was predicted of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.bits import bits_per_byte
from moe_runtime.evaluation.intervals import Interval, bootstrap_ratio


@dataclass(frozen=True)
class EvalResult:
    """Means over all predicted tokens.

    Args:
        loss: main cross-entropy, nats a token.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: summed cross-entropy in bits over the bytes of text predicted; nan without any.
        tokens, bytes: how many were predicted.
        documents: that these tokens lie in.
        bits_per_byte_low, bits_per_byte_high: 95% interval, by bootstrap over documents; nan for one
            document.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    bits_per_byte_low: float
    bits_per_byte_high: float


@dataclass(frozen=True)
class Tally:
    """What was predicted of each document.

    Args:
        nats: float64 [documents], summed cross-entropy.
        tokens, bytes: int64 [documents], predicted.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    bytes: NDArray[np.int64]

    @classmethod
    def empty(cls, documents: int) -> "Tally":
        """Nothing predicted yet."""
        return cls(np.zeros(documents), *(np.zeros(documents, np.int64) for _ in range(2)))

    def add(self, documents: NDArray[np.int64], nats: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
        """Count tokens: the document of each, its nats and its bytes, all [tokens]."""
        np.add.at(self.nats, documents, nats)
        np.add.at(self.tokens, documents, 1)
        np.add.at(self.bytes, documents, sizes)

    def of(self, documents: NDArray[np.bool_]) -> "Tally":
        """Some of the documents."""
        return Tally(self.nats[documents], self.tokens[documents], self.bytes[documents])

    @staticmethod
    def joined(tallies: Sequence["Tally"]) -> "Tally":
        """The documents of several tallies, one after the other."""
        columns = ("nats", "tokens", "bytes")
        return Tally(*(np.concatenate([getattr(one, name) for one in tallies]) for name in columns))

    def result(self) -> EvalResult:
        """The means; at least one token has been counted."""
        seen = self.of(self.tokens > 0)
        nats, tokens, num_bytes = math.fsum(seen.nats), int(seen.tokens.sum()), int(seen.bytes.sum())
        loss = nats / tokens
        interval = Interval(math.nan, math.nan, math.nan)
        if num_bytes:
            interval = bootstrap_ratio((seen.nats / math.log(2)).tolist(), seen.bytes.tolist())
        return EvalResult(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=bits_per_byte(nats, num_bytes),
            tokens=tokens,
            bytes=num_bytes,
            documents=len(seen.tokens),
            bits_per_byte_low=interval.low,
            bits_per_byte_high=interval.high,
        )


def by_part(tally: Tally, parts: NDArray[np.int64], names: Sequence[str]) -> dict[str, Tally]:
    """The tally of each part of a source of which something was predicted, in the order of their names.

    Args:
        parts: int64 [documents], place in `names`.
    """
    seen = {name: tally.of(parts == place) for place, name in enumerate(names)}
    return {name: seen[name] for name in sorted(seen) if seen[name].tokens.any()}
