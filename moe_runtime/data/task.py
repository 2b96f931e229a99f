"""What is to be prepared, and how a step of it tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.config.data import TextForm
from moe_runtime.data.documents import PLAIN

# Called with bytes of the source that have been read of a chunk.
Tick = Callable[[int], None]
# Called with (what is being done, bytes of the source done, bytes in all).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Request:
    """What is to be prepared, spelled as in the config.

    Args:
        source: builtin:stdlib, dir:PATH, glob:PATTERN, or a .txt, .jsonl or .parquet file.
        tokenizer: byte, bpe:N, deepseek, or the path of a tokenizer.json.
        seed: keys which training documents are rewritten and where they are cut.
        fim_rate: share of training documents rewritten prefix-suffix-middle, 0..1.
        validation_fraction: share of documents in the validation split.
        form: which text of an object is read, and what of it is a target.
    """

    source: str
    tokenizer: str = "byte"
    seed: int = 1234
    fim_rate: float = 0.0
    validation_fraction: float = 0.05
    form: TextForm = PLAIN
