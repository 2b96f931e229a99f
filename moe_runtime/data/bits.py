"""Bits per byte: a loss that can be compared over tokenizers."""

import math

import torch
from torch import Tensor

from moe_runtime.data.vocabulary import Tokenizer, byte_lengths


class ByteCounter:
    """Counts the bytes of text that token ids stand for.

    Control ids stand for none: what it costs to predict the end of a document is counted, in nats,
    but it brings no bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._lengths = torch.from_numpy(byte_lengths(tokenizer))

    def bytes_of(self, targets: Tensor) -> int:
        """Bytes of text in `targets`, integer ids of any shape; ids beyond the tokenizer count 0."""
        ids = targets.reshape(-1).to("cpu", torch.int64)
        ids = ids[(ids >= 0) & (ids < self._lengths.numel())]
        return int(self._lengths[ids].sum())


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Summed cross-entropy in nats over the bytes it predicts; nan for no bytes."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
