"""Sequences of a mixture of prepared sets from their numbers; each set keeps an order of its own.

The order of a set is keyed by the run's seed and the set's name, so that another set beside it, or another
weight, moves which sequences come when, never their order.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.mixture import Mixture, quotas_of, resumed
from moe_runtime.data.vocabulary import Ids


class MixtureLoader:
    """Rows of tokens of several sets in given shares.

    Args:
        loaders: of the training splits, by name; those of weight 0 are not asked.
        weights: of each set.

    Raises:
        DataError: a weight so small that its set would never be read.
    """

    def __init__(self, loaders: Mapping[str, BatchLoader], weights: Mapping[str, float]) -> None:
        self._quotas = quotas_of(weights)
        self.loaders = {name: loaders[name] for name in self._quotas}
        first = next(iter(self.loaders.values()))
        self.seq_len, self.row_tokens = first.seq_len, first.row_tokens
        self.mixture = Mixture(self._quotas)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each set in the sequences."""
        period = sum(self._quotas.values())
        return {name: quota / period for name, quota in self._quotas.items()}

    @property
    def is_masked(self) -> bool:
        """Some tokens are no targets."""
        return any(loader.is_masked for loader in self.loaders.values())

    def rows(self, sequence_numbers: Sequence[int] | Ids) -> Tensor:
        """As `BatchLoader.rows`.

        Raises:
            DataError: an id is not below vocab_size; names file and offset.
        """
        numbers = np.asarray(sequence_numbers, dtype=np.int64)
        rows = torch.empty(len(numbers), self.row_tokens, dtype=torch.int64)
        for name, places, own in self.mixture.locate(numbers):
            rows[torch.from_numpy(places)] = self.loaders[name].rows(own)
        return rows

    def sequences(self, first: int, count: int) -> Tensor:
        """Rows of the sequences first .. first + count - 1."""
        return self.rows(np.arange(first, first + count, dtype=np.int64))

    def epochs(self, number: int) -> dict[str, float]:
        """How often each set was read before this sequence, parts of an epoch too."""
        counts = self.mixture.counts(number)
        return {name: counts.get(name, 0) / loader.samples_per_epoch for name, loader in self.loaders.items()}

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        prints = {name: loader.dataset.manifest.fingerprint for name, loader in self.loaders.items()}
        return {"segments": self.mixture.to_json(), "seq_len": self.seq_len, "fingerprints": prints}

    def restore(self, fields: Mapping[str, Any], number: int) -> None:
        """Go on where a checkpoint stands.

        Args:
            fields: what `to_json` gave then; empty where the run had no mixture.
            number: first sequence that is not trained on yet.
        """
        stretch = Fraction(fields.get("seq_len", self.seq_len), self.seq_len)
        self.mixture = resumed(self._quotas, fields.get("segments", ()), number, stretch)

    def differences(self, fields: Mapping[str, Any]) -> list[str]:
        """What to say where a checkpoint had other sets, shares or tokens."""
        said = []
        saved = fields.get("segments", ())
        if not saved:
            said.append("data: now a mixture, each set from its beginning")
        elif saved[-1]["quotas"] != self._quotas:
            was = _percent(saved[-1]["quotas"])
            said.append(
                f"data.mixture: was {was}, is {_percent(self._quotas)}; each set goes on where it stood"
            )
        for name, loader in self.loaders.items():
            before = fields.get("fingerprints", {}).get(name)
            if before is not None and before != loader.dataset.manifest.fingerprint:
                said.append(f"warning: data.mixture.{name}: other tokens than those the run began with")
        return said


def set_seed(seed: int, name: str) -> int:
    """Keys the order of the set `name` of a run with this seed."""
    key = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(name.encode(), key=key, digest_size=8).digest(), "little")


def _percent(quotas: Mapping[str, int]) -> str:
    total = sum(quotas.values())
    return ", ".join(f"{name} {100 * quota / total:.3g} %" for name, quota in quotas.items())
