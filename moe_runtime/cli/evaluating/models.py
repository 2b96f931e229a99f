"""Models of the command line, opened for evaluation: our checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, Checkpoint, open_checkpoint
from moe_runtime.checkpoint.hugging_face.end_ids import eos_ids_of
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.cli.own_tokenizer import own_tokenizer
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import ConfigError, DataError
from moe_runtime.evaluation.our_model import OurModel
from moe_runtime.model.transformer import Transformer


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint of ours and its model."""

    checkpoint: Checkpoint
    config: RunConfig
    model: Transformer


def open_ours(path: Path, device: str, ema: bool) -> OpenModel:
    """Load a checkpoint's model.

    Raises:
        CheckpointError: there is no good one.
    """
    checkpoint = open_checkpoint(path)
    return OpenModel(checkpoint, config_of(checkpoint), model_from(checkpoint, device, ema=ema))


def language_model(opened: OpenModel, name: str) -> OurModel:
    """The same with its tokenizer, as tasks want it.

    Raises:
        ConfigError: the checkpoint carries none, or one with more ids than the model has.
    """
    tokenizer = own_tokenizer(opened.checkpoint)
    if tokenizer is None:
        raise ConfigError(
            f"{opened.checkpoint.path}: expected a checkpoint with a tokenizer, got none; import it again "
            "with --tokenizer"
        )
    model = opened.config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{opened.checkpoint.path}: expected a tokenizer of at most the model's {model.vocab_size} ids, "
            f"got {tokenizer.vocab_size}; import it again with its own --tokenizer"
        )
    stop_ids = eos_ids_of(opened.checkpoint)
    return OurModel(name, opened.model, tokenizer, context_of(model, opened.config), stop_ids)


def context_of(model: ModelConfig, config: RunConfig) -> int:
    """Tokens that a model sees at most: those of its training sequences, or what YaRN stretches them to.

    An export writes the same number as `max_position_embeddings`.
    """
    if model.yarn is not None:
        return int(model.yarn.factor * model.yarn.original_seq_len)
    return config.batch.seq_len


def check_tokenizer(checkpoint: Checkpoint, dataset: TokenDataset) -> None:
    """Ids of another tokenizer would give a loss that means nothing.

    Raises:
        DataError: the data was prepared with another.
    """
    trained_with = json.loads(checkpoint.extra(TOKENIZER_FILE))
    if json.loads(dataset.load_tokenizer().to_json()) != trained_with:
        raise DataError(
            f"{dataset.folder}: expected ids of the tokenizer that {checkpoint.path} was trained with, "
            f"got those of {dataset.manifest.tokenizer.name}; prepare the data with that tokenizer"
        )
