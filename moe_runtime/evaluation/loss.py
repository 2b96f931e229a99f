"""Loss of a model on prepared text, on one device, told apart by document.

The windows are those of validation in training: the packed stream cut into sequences of `batch.seq_len`, with
the end of one document and the beginning of the next in one window. So the figure is that of the run, and its
total does not depend on how sources are told apart. Only where the last window goes on at the beginning of
the split, as sequences of training do, these tokens are left out: every token counts once, the first one
not, for nothing stands before it. Tokens that are no targets of training are read, and not counted either.
"""

import numpy as np
import torch

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.vocabulary import byte_lengths
from moe_runtime.evaluation.tally import Tally
from moe_runtime.model.loss import token_losses
from moe_runtime.model.targets import token_ids
from moe_runtime.model.transformer import Transformer


@torch.no_grad()
def evaluate(model: Transformer, loader: BatchLoader, sequences: int, batch_sequences: int) -> Tally:
    """Run a model over the first sequences of a split, the same ones each time.

    Args:
        model: the whole model.
        loader: over the split.
        sequences: at most so many; a small split ends after all of its text.
        batch_sequences: how many are run at a time.

    Raises:
        DataError: an id that the model does not have.
    """
    device = next(model.parameters()).device
    dataset = loader.dataset
    lengths = byte_lengths(dataset.load_tokenizer())
    ends = dataset.document_starts()[1:].astype(np.int64)
    tally = Tally.empty(len(ends))
    last = min(sequences, loader.samples_per_epoch)
    for first in range(0, last, batch_sequences):
        numbers = np.arange(first, min(first + batch_sequences, last))
        rows = loader.rows(numbers)[:, : loader.seq_len + 1].to(device)
        tokens, is_target = token_ids(rows), (rows[:, 1:] >= 0).reshape(-1).cpu().numpy()
        targets = tokens[:, 1:].reshape(-1)
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        nats = token_losses(hidden, model.head.weight, targets).double().cpu().numpy()
        places = loader.starts(numbers)[:, None] + np.arange(1, loader.seq_len + 1)
        places = places.reshape(-1)
        # The last window goes on at the beginning, which others predict.
        once = (places < dataset.num_tokens) & is_target
        documents = np.searchsorted(ends, places[once], side="right")
        ids = targets.cpu().numpy()
        sizes = np.where(ids < len(lengths), lengths[np.minimum(ids, len(lengths) - 1)], 0)
        tally.add(documents, nats[once], sizes[once])
    return tally
