"""Bits per byte of whole documents, by one rule of windows for every model.

A document is tokenised by the model's own tokenizer. Before it stands the id that begins a text there (or
ends one, where there is none that begins). The first window predicts all its tokens; each later one begins
half a window further on and predicts the tokens that no window before has, so that every token of a long
document has at least half a window before it. Every token of the text is predicted exactly once, and nothing
else: whether a text ends is not asked, since not every tokenizer has a word for it.

The figure is over bytes of the text, so tokenizers compare; each has to spell the text, byte by byte.

Rejected: windows over packed text, as in training (a model of another tokenizer has no such packing); windows
without overlap (the first tokens of each would be guessed from nothing, and the more so the smaller the
window).
"""

import math
from collections.abc import Sequence
from itertools import islice

from moe_runtime.errors import DataError, NumericsError
from moe_runtime.evaluation.documents import Text
from moe_runtime.evaluation.language_model import LanguageModel

WINDOWS = 512  # given to a model at a time: enough to make even batches of, and no more than that held
RULE = (
    "each document by itself, after the id that begins a text; windows of {context} tokens, each half a "
    "window after the one before; every token of the text predicted once, its end not"
)


def document_nats(model: LanguageModel, texts: Sequence[Text], context: int) -> list[float]:
    """Summed cross-entropy of each text, in nats.

    Args:
        context: tokens of a window that are read, at most the model's.

    Raises:
        DataError: the model's tokenizer does not spell a text.
        NumericsError: the model gives something that is no number.
    """
    assert 2 <= context <= model.context, f"windows of {context} for a model of {model.context}"
    totals = [0.0] * len(texts)
    windows = (
        (number, fresh, whole[begin:end])
        for number, text in enumerate(texts)
        for whole in [[model.start_id, *spelled(model, text)]]
        for begin, end, fresh in spans(len(whole), context)
    )
    while some := list(islice(windows, WINDOWS)):
        found = model.token_nats([window for _, _, window in some])
        for (number, fresh, _), nats in zip(some, found, strict=True):
            totals[number] += sum(nats[len(nats) - fresh :])
    for text, total in zip(texts, totals, strict=True):
        if not math.isfinite(total):
            raise NumericsError(f"{model.name}: expected finite losses, got {total} for {text.where}")
    return totals


def spans(length: int, context: int) -> list[tuple[int, int, int]]:
    """(begin, end, new) of each window over `length` ids: ids [begin, end), of which the last `new` are new.

    A window reads `context` ids and predicts one more.
    """
    found, done, begin = [], 1, 0
    while done < length:
        end = min(begin + context + 1, length)
        found.append((begin, end, end - done))
        done, begin = end, begin + context // 2
    return found


def spelled(model: LanguageModel, text: Text) -> list[int]:
    """Ids of a text, which stand for exactly its bytes.

    Raises:
        DataError: they do not.
    """
    ids = model.encode(text.text, at_start=False)
    wanted, got = text.text.encode(), model.spell(ids)
    if got != wanted:
        place = next(
            (at for at, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]),
            min(len(wanted), len(got)),
        )
        raise DataError(
            f"{model.name}: expected a tokenizer that spells {text.where}, got {got[place : place + 12]!r} "
            f"for {wanted[place : place + 12]!r} at byte {place}; bits per byte would be of another text, so "
            "leave the model or the data out"
        )
    return ids
