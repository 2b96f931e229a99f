"""Sequences of the global batch from their numbers alone.

Sequences are numbered from the start of training. Number n belongs to epoch n // samples, where it
is sample permuted(n % samples); sample k covers tokens [k S, k S + S + 1 + D) of the stream, so that
targets of the next and of D further tokens overlap the following sample and every token is a target
once an epoch. The last sample goes on at the start of the stream. Nothing else is state: every layout
sees the same global batch, a rank reads its own rows only, and a run resumes from a number.

A token that is read but not to be predicted (a prompt, say) stands in a row as its complement, -1 - id
(`model.targets`). Rejected: a second tensor of masks, which everything between the loader and the loss would
have to carry along for the few runs that have one.

Documents are packed without a border: a sequence may hold the end of one and the start of the next,
with an end-of-document id between. Ref: DSV3 §4.1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_runtime.data.order import permuted
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import Ids
from moe_runtime.errors import DataError

VALIDATION_SEED = 0  # windows of validation do not depend on a run's seed: runs are compared on the same text


class Loader(Protocol):
    """What training needs of one set or of a mixture of them; `BatchLoader` says what each means."""

    seq_len: int
    row_tokens: int

    @property
    def is_masked(self) -> bool: ...
    def rows(self, sequence_numbers: Sequence[int] | Ids) -> Tensor: ...
    def epochs(self, number: int) -> dict[str, float]: ...
    def to_json(self) -> dict[str, Any]: ...
    def restore(self, fields: Mapping[str, Any], number: int) -> None: ...
    def differences(self, fields: Mapping[str, Any]) -> list[str]: ...


class BatchLoader:
    """Rows of tokens of a split, in an order keyed by (seed, epoch).

    Args:
        dataset: the split.
        seq_len: S, tokens predicted per sequence.
        mtp_depth: D, further tokens that MTP predicts.
        seed: keys the order.
        vocab_size: rows of the model's embedding; ids must lie below.

    Raises:
        DataError: the vocabulary is too small for the ids, or the split is shorter than a sequence.
    """

    def __init__(
        self, dataset: TokenDataset, seq_len: int, mtp_depth: int, seed: int, vocab_size: int | None = None
    ) -> None:
        self.dataset, self.seq_len, self.seed = dataset, seq_len, seed
        self.row_tokens = seq_len + 1 + mtp_depth
        self.vocab_size = vocab_size if vocab_size is not None else dataset.max_id + 1
        where = f"{dataset.folder}: {dataset.split} split"
        if dataset.max_id >= self.vocab_size:
            raise DataError(
                f"{where} holds token id {dataset.max_id}, but model.vocab_size is {self.vocab_size}; "
                f"set it to at least {dataset.manifest.tokenizer.vocab_size}"
            )
        if dataset.num_tokens < self.row_tokens:
            raise DataError(
                f"{where} holds {dataset.num_tokens} tokens, fewer than one sequence of {self.row_tokens} "
                "(batch.seq_len + 1 + model.mtp_depth); shorten batch.seq_len, raise "
                "data.validation_fraction or use a larger source"
            )
        self.samples_per_epoch = -(-dataset.num_tokens // seq_len)

    @property
    def is_masked(self) -> bool:
        """Some tokens are no targets."""
        return self.dataset.is_masked

    def rows(self, sequence_numbers: Sequence[int] | Ids) -> Tensor:
        """Tokens of the sequences with these numbers, int64 [sequences, seq_len + 1 + mtp_depth].

        A token that is not to be predicted is given as its complement.

        Args:
            sequence_numbers: counted from the start of training, any order.

        Raises:
            DataError: an id is not below vocab_size; names file and offset.
        """
        starts = self.starts(sequence_numbers)
        rows = np.empty((len(starts), self.row_tokens), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self.dataset.read(int(start), self.row_tokens)
        if rows.size and int(rows.max()) >= self.vocab_size:
            row_idx, column = np.argwhere(rows >= self.vocab_size)[0]
            where = self.dataset.locate(int(starts[row_idx]) + int(column))
            raise DataError(
                f"{where}: token id {rows[row_idx, column]} is not below {self.vocab_size}; "
                "prepare the data again"
            )
        if self.is_masked:
            for row, start in zip(rows, starts, strict=True):
                row[:] = np.where(self.dataset.read_targets(int(start), self.row_tokens), row, ~row)
        return torch.from_numpy(rows)

    def sequences(self, first: int, count: int) -> Tensor:
        """Rows of the sequences first .. first + count - 1."""
        return self.rows(np.arange(first, first + count, dtype=np.int64))

    def epochs(self, number: int) -> dict[str, float]:
        """How often the split was read before this sequence, parts of an epoch too; the set has no name."""
        return {"": number / self.samples_per_epoch}

    def validation_batches(self, num_sequences: int, batch_size: int) -> Iterator[Tensor]:
        """The first sequences of epoch 0, the same ones each time, in batches.

        Args:
            num_sequences: at most; a small split ends after one epoch.
            batch_size: sequences a batch; the last one may hold fewer.
        """
        last = min(num_sequences, self.samples_per_epoch)
        for first in range(0, last, batch_size):
            yield self.sequences(first, min(batch_size, last - first))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"fingerprints": {"": self.dataset.manifest.fingerprint}}

    def restore(self, fields: Mapping[str, Any], number: int) -> None:
        """Nothing to take from a checkpoint: a number says all."""

    def differences(self, fields: Mapping[str, Any]) -> list[str]:
        """What to say where a checkpoint had other tokens."""
        if "segments" in fields:
            return ["data: no mixture any more; the order of data.path is taken up at the same number"]
        before, now = fields.get("fingerprints", {}).get(""), self.dataset.manifest.fingerprint
        if before in (None, now):
            return []
        return [f"warning: {self.dataset.folder}: other tokens than those the run began with"]

    def starts(self, sequence_numbers: Sequence[int] | Ids) -> Ids:
        """Position in the stream where each sequence begins, int64 [sequences]."""
        numbers = np.asarray(sequence_numbers, dtype=np.int64)
        epochs, positions = np.divmod(numbers, self.samples_per_epoch)
        return permuted(positions, epochs, self.samples_per_epoch, self.seed) * self.seq_len
