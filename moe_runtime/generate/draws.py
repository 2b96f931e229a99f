"""Uniform numbers that depend on a sequence's seed, their purpose and the token's index, on nothing else.

So a sequence comes out the same alone and in any batch, and each token has its own numbers however many
passes led to it. Speculation may look at the numbers of a token several times: as long as every earlier
look was thrown away with its draft, no output has depended on them, and they are as good as fresh.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_runtime.optim.counter_rng import derive_key, random_rows

Stream = Literal["pick", "accept", "draft"]
BLOCK = 256  # tokens for which numbers are made at a time


class Draws:
    """The numbers of a batch.

    Args:
        seeds: of each row; rows of one seed have the same numbers.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._seeds = list(seeds)
        self._device = device
        self._tables: dict[Stream, Tensor] = {}

    def at(self, stream: Stream, index: Tensor) -> Tensor:
        """Numbers of tokens.

        Args:
            stream: "draft" draws a draft, "accept" decides on it, "pick" draws any other token.
            index: int64 [rows] or [rows, n] on the CPU: new tokens of each row, counted from 0.

        Returns:
            float64 in [0, 1), the shape of `index`, on the device.
        """
        table = self._tables.get(stream)
        last = int(index.max()) if index.numel() else 0
        if table is None or last >= table.shape[1]:
            table = self._extend(stream, last)
        return table.gather(1, index.view(len(self._seeds), -1)).view(index.shape).to(self._device)

    def keep(self, rows: Sequence[int]) -> "Draws":
        """The numbers of some of the rows."""
        kept = Draws([self._seeds[row] for row in rows], self._device)
        kept._tables = {stream: table[list(rows)] for stream, table in self._tables.items()}
        return kept

    def _extend(self, stream: Stream, last: int) -> Tensor:
        """Make the numbers up to token `last` and to the end of its block."""
        old = self._tables.get(stream)
        start = 0 if old is None else old.shape[1]
        count = (last // BLOCK + 1) * BLOCK - start
        new = _uniforms(self._seeds, stream, start, count)
        self._tables[stream] = new if old is None else torch.cat([old, new], dim=1)
        return self._tables[stream]


def _uniforms(seeds: Sequence[int], stream: Stream, start: int, count: int) -> Tensor:
    """float64 [seeds, count] of 53 random bits each."""
    purpose = get_args(Stream).index(stream)
    halves = (
        random_rows([derive_key(seed, 0, purpose, half) for seed in seeds], start, count) for half in (0, 1)
    )
    high, low = (half.to(torch.int64) & 0xFFFFFFFF for half in halves)
    return (high << 21 | low >> 11).to(torch.float64) * 2.0**-53
