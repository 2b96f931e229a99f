"""The tokenizer that a checkpoint carries."""

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, Checkpoint
from moe_runtime.data.tokenizer import tokenizer_from_json
from moe_runtime.data.vocabulary import Tokenizer


def own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if it carries none, as one imported without may.

    Raises:
        CheckpointError, DataError: the file is damaged, or is no tokenizer.
    """
    if TOKENIZER_FILE not in checkpoint.manifest.files:
        return None
    return tokenizer_from_json(checkpoint.extra(TOKENIZER_FILE).decode(), str(checkpoint.path))
