"""Texts of a prepared set, for models of any tokenizer."""

from dataclasses import dataclass

import numpy as np

from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import decode_bytes


@dataclass(frozen=True)
class Text:
    """A document, or its beginning.

    Args:
        where: set and number of the document, for messages.
        part: of the source that it belongs to.
    """

    where: str
    part: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Its length in UTF-8."""
        return len(self.text.encode())


def read_texts(dataset: TokenDataset, documents: int | None, max_bytes: int) -> list[Text]:
    """Documents of a split, evenly spread over it, each from its beginning.

    Args:
        documents: at most so many; None: all.
        max_bytes: of each at most, cut where a character ends.
    """
    tokenizer, (parts, names) = dataset.load_tokenizer(), dataset.document_parts()
    starts = dataset.document_starts().astype(np.int64)
    count = len(starts) - 1
    chosen = np.unique(np.linspace(0, count - 1, min(count, documents or count)).round().astype(np.int64))
    found = []
    for number in chosen.tolist():
        # A token of text has at least a byte, so no more tokens are needed than bytes.
        length = min(int(starts[number + 1] - starts[number]), max_bytes + 1)
        raw = decode_bytes(tokenizer, dataset.read(int(starts[number]), length).tolist())
        text = raw[:max_bytes].decode("utf-8", "ignore")
        if text:
            found.append(Text(f"document {number} of {dataset.folder}", names[int(parts[number])], text))
    return found
