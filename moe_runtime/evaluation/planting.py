"""Text that teaches retrieval: needles planted between the lines of prepared text.

    needle = 'KKKK'
    def scroll(self, dx=0, dy=0):
    needle = 'KKKK'
        if self.closed:
            return
    needle = 'QQQQ'

Plain text of a few million bytes does not teach a small model to look a value up, so that there is nothing
which an extension could carry to greater lengths. Here each needle but the changed ones asks for the value of
the one before it. How dense they stand decides whether it is learned at all: a small model finds out first to
look at a needle that is near, and only then at one that is far.
"""

from collections.abc import Iterator

import numpy as np

from moe_runtime.data.shards import TokenDataset
from moe_runtime.evaluation.needle import NeedleForm

KEPT = 0.8  # of needles repeat the value before them, which makes the copy worth learning


def planted(dataset: TokenDataset, form: NeedleForm, every: float, seed: int) -> Iterator[str]:
    """The documents of a split, each with needles of its own.

    Args:
        every: characters of text to a needle, on average.
        seed: the same one plants the same needles.
    """
    tokenizer, starts = dataset.load_tokenizer(), dataset.document_starts()
    for number in range(len(starts) - 1):
        first, end = int(starts[number]), int(starts[number + 1])
        text = tokenizer.decode(dataset.read(first, end - first).tolist())
        yield plant(text, form, every, np.random.default_rng([seed, number]))


def plant(text: str, form: NeedleForm, every: float, random: np.random.Generator) -> str:
    """Needles at places drawn evenly over `text`, each moved to the start of its line."""
    lines = text.splitlines(keepends=True)
    counts = random.poisson([len(line) / every for line in lines])
    key, value = form.draw_key(random), form.draw_values(random, 1)[0]
    pieces = []
    for line, count in zip(lines, counts, strict=True):
        for _ in range(count):
            if random.random() >= KEPT:
                value = form.draw_values(random, 1)[0]
            pieces.append(form.line.format(key=key, value=value))
        pieces.append(line)
    return "".join(pieces)
