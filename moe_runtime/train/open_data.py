"""The data of a run: prepared by one rank where it is missing, then opened by all."""

from dataclasses import dataclass
from pathlib import Path

from moe_runtime.config.data import DataConfig
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.loader import VALIDATION_SEED, BatchLoader, Loader
from moe_runtime.data.mixture_loader import MixtureLoader, set_seed
from moe_runtime.data.prepare import ensure_prepared, silent
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Progress
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import DataError
from moe_runtime.parallel.peers import Peers


@dataclass(frozen=True)
class ValidationSets:
    """The validation splits of a run.

    Args:
        loaders: by the name of the set; '' for that of `data.path`.
        shares: of each set in training; those that are validated only have none.
    """

    loaders: dict[str, BatchLoader]
    shares: dict[str, float]


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        datasets: training splits by the name of the set.
    """

    tokenizer: Tokenizer
    loader: Loader
    validation: ValidationSets
    datasets: dict[str, TokenDataset]


def open_data(config: RunConfig, peers: Peers, progress: Progress = silent) -> RunData:
    """The tokenizer, and loaders of training and validation; a collective call.

    Args:
        progress: told of the preparation, on the rank that does it.

    Raises:
        DataError: it cannot be prepared, or is damaged; on every rank alike.
    """
    sets = config.data.sets()

    def prepare_all() -> None:
        for name, one in sets.items():
            ensure_prepared(one, config.seed, progress, config.data.claims(name))

    peers.first_does(prepare_all, (DataError,))
    return peers.alike(lambda: _open_all(config, sets), (DataError,))


def _open_all(config: RunConfig, sets: dict[str, DataConfig]) -> RunData:
    manifests = {
        name: ensure_prepared(one, config.seed, claims=config.data.claims(name)) for name, one in sets.items()
    }
    folders = {name: Path(str(one.path)) for name, one in sets.items()}
    first = next(iter(sets))
    for name, manifest in manifests.items():
        if manifest.tokenizer.record.sha256 != manifests[first].tokenizer.record.sha256:
            raise DataError(
                f"data.mixture.{name}: expected the tokenizer of {first}, got {manifest.tokenizer.name} of "
                f"{folders[name]}; prepare it with --tokenizer {folders[first] / 'tokenizer.json'}"
            )
    validation = {
        name: _loader(config, TokenDataset.open(folder, "validation"), VALIDATION_SEED)
        for name, folder in folders.items()
    }
    if not config.data.mixture:
        train = TokenDataset.open(folders[first], "train")
        loader = _loader(config, train, config.seed)
        sets_of = ValidationSets(validation, {first: 1.0})
        return RunData(train.load_tokenizer(), loader, sets_of, {first: train})
    weights = {name: one.weight for name, one in config.data.mixture.items()}
    datasets = {
        name: TokenDataset.open(folder, "train") for name, folder in folders.items() if weights[name] > 0
    }
    mixed = MixtureLoader(
        {name: _loader(config, data, set_seed(config.seed, name)) for name, data in datasets.items()}, weights
    )
    tokenizer = next(iter(datasets.values())).load_tokenizer()
    return RunData(tokenizer, mixed, ValidationSets(validation, mixed.shares), datasets)


def _loader(config: RunConfig, dataset: TokenDataset, seed: int) -> BatchLoader:
    model = config.model
    return BatchLoader(dataset, config.batch.seq_len, model.mtp_depth, seed, model.vocab_size)
