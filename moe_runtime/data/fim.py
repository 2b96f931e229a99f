"""Fill-in-the-middle: a share of training documents is rewritten prefix, suffix, middle.

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

When. At preparation, once, before packing, as the report does; not while loading. A rewritten
document is three tokens longer and its parts are tokenised apart (a cut inside a word is the point),
so rewriting at load time would need the text, the tokenizer and a running sum over all documents to
find token n, where now token n is an offset in a file. The price: a document keeps its form and its
cut over the epochs; another seed or rate is another folder, and the manifest records both.

Which and where. Counter-based on (seed, hash of the document), so neither order nor neighbours
matter. Cuts are two places between characters, uniform and independent; parts may be empty.

The report also splits a share of the tokens that join punctuation and line end, against a bias at
the end of multi-line prompts; that is left out here. Validation text is never rewritten, so that
bits per byte can be compared over rates.
"""

import hashlib

import numpy as np

from moe_runtime.data.vocabulary import FimIds, Ids


def cut_document(text: str, digest: bytes, seed: int, rate: float) -> tuple[str, str, str] | None:
    """(prefix, suffix, middle) if the document is to be rewritten, else None. Ref: DSV3 §4.1.

    Args:
        digest: hash of the document.
        rate: share of documents rewritten, 0..1.
    """
    key = (seed % 2**64).to_bytes(8, "little")
    draws = np.frombuffer(hashlib.blake2b(digest, key=key, digest_size=24, person=b"fim").digest(), "<u8")
    if int(draws[0]) >= int(rate * 2**64):
        return None
    first, second = sorted(int(draw) % (len(text) + 1) for draw in draws[1:])
    return text[:first], text[second:], text[first:second]


def join_parts(prefix: Ids, suffix: Ids, middle: Ids, fim: FimIds) -> Ids:
    """Ids of the rewritten document, without its end."""
    marks = np.array(fim, dtype=np.int64)
    return np.concatenate([marks[:1], prefix, marks[1:2], suffix, marks[2:], middle])
