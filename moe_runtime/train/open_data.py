"""The data of a run: prepared by one rank if it is missing, then opened by all."""

from pathlib import Path

from moe_runtime.config.schema import RunConfig
from moe_runtime.data.loader import VALIDATION_SEED, BatchLoader
from moe_runtime.data.prepare import ensure_prepared, silent
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.survey import Progress
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import DataError
from moe_runtime.parallel.peers import Peers


def open_data(
    config: RunConfig, peers: Peers, progress: Progress = silent
) -> tuple[Tokenizer, BatchLoader, BatchLoader]:
    """The tokenizer, and loaders of training and validation; a collective call.

    Args:
        progress: told of the preparation, on the rank that does it.

    Raises:
        DataError: it cannot be prepared, or is damaged; on every rank alike.
    """
    peers.first_does(lambda: ensure_prepared(config.data, config.seed, progress), (DataError,))

    def open_all() -> tuple[Tokenizer, BatchLoader, BatchLoader]:
        ensure_prepared(config.data, config.seed)
        folder = Path(config.data.path)
        train, validation = TokenDataset.open(folder, "train"), TokenDataset.open(folder, "validation")
        loaders = _loader(config, train, config.seed), _loader(config, validation, VALIDATION_SEED)
        return train.load_tokenizer(), *loaders

    return peers.alike(open_all, (DataError,))


def _loader(config: RunConfig, dataset: TokenDataset, seed: int) -> BatchLoader:
    model = config.model
    return BatchLoader(dataset, config.batch.seq_len, model.mtp_depth, seed, model.vocab_size)
