"""What a model that sees one byte back would reach, in bits per byte.

An order-1 model: p(next | this byte) from counts on the training split, scored on the validation
split. Symbols are the 256 bytes and the end of a document, which also stands before the first byte, so
the baseline pays for the same things as the model: every byte and every end. Ids of any tokenizer are
turned into their bytes first; control ids other than the end are left out.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import Ids, Tokenizer, byte_lengths

END = 256
SYMBOLS = 257
BLOCK_TOKENS = 1024 * 1024
# Counts of pairs of bytes are settled long before this many tokens.
FITTED_TOKENS = 128 * 1024 * 1024


def order1_bits_per_byte(train: TokenDataset, validation: TokenDataset, tokenizer: Tokenizer) -> float:
    """Bits per byte of an order-1 byte model fitted on `train`, on the whole of `validation`.

    Counts start at one half for every pair (Krichevsky-Trofimov). Of a very large training split the
    first 2^27 tokens are used.
    """
    counts = pair_counts(train, tokenizer, FITTED_TOKENS) + 0.5
    costs = np.log2(counts.sum(axis=1, keepdims=True)) - np.log2(counts)
    scored = pair_counts(validation, tokenizer, validation.num_tokens)
    return float((scored * costs).sum() / scored[:, :END].sum())


def pair_counts(dataset: TokenDataset, tokenizer: Tokenizer, max_tokens: int) -> NDArray[np.int64]:
    """How often symbol b follows symbol a, int64 [257, 257]."""
    counts = np.zeros(SYMBOLS * SYMBOLS, dtype=np.int64)
    before = END
    for block in _symbols(dataset, tokenizer, max_tokens):
        if block.size:
            pairs = np.concatenate([[before], block[:-1]]) * SYMBOLS + block
            counts += np.bincount(pairs, minlength=counts.size)
            before = int(block[-1])
    return counts.reshape(SYMBOLS, SYMBOLS)


def _symbols(dataset: TokenDataset, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Ids]:
    """The stream as symbols 0..256, block by block."""
    pieces = list(tokenizer.id_bytes)
    lengths = byte_lengths(tokenizer)
    lengths[tokenizer.eos_id] = 1
    pieces[tokenizer.eos_id] = b"\0"  # a place, overwritten below
    table = np.frombuffer(b"".join(pieces), dtype=np.uint8).astype(np.int64)
    firsts = np.cumsum(lengths) - lengths
    table[firsts[tokenizer.eos_id]] = END
    total = min(max_tokens, dataset.num_tokens)
    for start in range(0, total, BLOCK_TOKENS):
        ids = dataset.read(start, min(BLOCK_TOKENS, total - start))
        ids = ids[ids < lengths.size]  # a step that read others was left out of training too
        sizes = lengths[ids]
        # Place of each symbol in the table: first place of its id, plus how far into the id it is.
        ends = np.cumsum(sizes)
        inside = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        yield table[np.repeat(firsts[ids], sizes) + inside]
