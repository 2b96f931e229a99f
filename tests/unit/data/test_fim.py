import itertools
import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.data.fim import cut_document
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import decode_bytes


@given(text=st.text(min_size=1, max_size=50), digest=st.binary(min_size=16, max_size=16), seed=st.integers(0))
def test_parts_join_to_the_document(text: str, digest: bytes, seed: int) -> None:
    parts = cut_document(text, digest, seed, rate=1.0)
    assert parts is not None
    prefix, suffix, middle = parts
    assert prefix + middle + suffix == text
    assert cut_document(text, digest, seed, rate=1.0) == parts
    assert cut_document(text, digest, seed, rate=0.0) is None


def test_rate_is_kept_and_cuts_are_uniform() -> None:
    digests = [index.to_bytes(16, "little") for index in range(4000)]
    found = [parts for digest in digests if (parts := cut_document("x" * 99, digest, 3, 0.1))]
    assert 320 < len(found) < 480  # mean 400, standard deviation 19: within 4
    # Two uniform cuts in 0..99 make three parts of a third each on average; 400 draws: deviation 1.2.
    for part in zip(*found, strict=True):
        assert abs(np.mean([len(text) for text in part]) - 33) < 5


def test_cuts_depend_on_seed_and_document() -> None:
    cuts = {cut_document("x" * 99, digest, seed, 1.0) for digest in (b"a" * 16, b"b" * 16) for seed in (1, 2)}
    assert len(cuts) == 4


def test_rewritten_documents_can_be_restored_from_the_shards(corpus: Path, bpe_folder: Path) -> None:
    train, validation = (TokenDataset.open(bpe_folder, split) for split in ("train", "validation"))
    tokenizer = train.load_tokenizer()
    fim = tokenizer.fim
    assert fim is not None
    texts = {json.loads(line)["text"].encode() for line in corpus.read_text().splitlines()}
    num_rewritten = 0
    for start, end in itertools.pairwise(train.document_starts().astype(np.int64)):
        ids = train.read(int(start), int(end - start)).tolist()
        assert ids.pop() == tokenizer.eos_id
        if fim.begin in ids:
            num_rewritten += 1
            hole, tail = ids.index(fim.hole), ids.index(fim.end)
            assert ids[0] == fim.begin
            assert [ids.count(mark) for mark in fim] == [1, 1, 1]
            ids = ids[1:hole] + ids[tail + 1 :] + ids[hole + 1 : tail]
        assert decode_bytes(tokenizer, ids) in texts
    assert num_rewritten == train.record.fim_documents > 0
    assert num_rewritten < train.record.documents
    assert not np.isin(validation.read(0, validation.num_tokens), fim).any()
