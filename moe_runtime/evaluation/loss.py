"""How good a model is, on one device: loss, perplexity, bits per byte."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.model.transformer import Transformer


@dataclass(frozen=True)
class EvalResult:
    """Means over all predicted tokens.

    Args:
        loss: main cross-entropy, nats a token.
        perplexity: exp(loss); infinite where that overflows.
        bits_per_byte: summed cross-entropy in bits over the bytes of text predicted; nan without any.
        tokens, bytes: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Tensor], bytes_of: Callable[[Tensor], int]) -> EvalResult:
    """Run a model over rows of tokens.

    Args:
        model: the whole model.
        batches: int64 [sequences, seq_len + 1 + mtp_depth] each, of any sizes, not empty altogether.
        bytes_of: bytes of text that target ids stand for, such as `data.bits.ByteCounter.bytes_of`.
    """
    device = next(model.parameters()).device
    nats, tokens, num_bytes = 0.0, 0, 0
    for rows in batches:
        targets = rows[:, 1 : rows.shape[1] - model.config.mtp_depth]
        loss = model.losses(rows.to(device)).loss
        nats += float(loss.double()) * targets.numel()
        tokens += targets.numel()
        num_bytes += bytes_of(targets)
    mean = nats / tokens
    bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
    return EvalResult(mean, math.exp(mean) if mean < 700 else math.inf, bits, tokens, num_bytes)
