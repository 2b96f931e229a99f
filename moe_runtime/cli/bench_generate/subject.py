"""What is measured: a checkpoint, prompts from text it was not trained on, and how often."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import ConfigError
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.targets import token_ids
from moe_runtime.model.transformer import Transformer


@dataclass(frozen=True)
class Settings:
    """What `bench generate` was asked for.

    Args:
        path: run folder or checkpoint folder.
        data: folder of prepared data; prompts are of its validation split.
        rounds: times each contender is timed.
        prompts: sequences for acceptance.
        prompt_tokens: of each.
        tokens: new ones of each.
        drafts: a pass; 0: as many as there are MTP modules.
        threads: of the CPU.
        device: cpu or cuda.
    """

    path: Path
    data: Path
    rounds: int = 5
    prompts: int = 32
    prompt_tokens: int = 64
    tokens: int = 256
    drafts: int = 0
    threads: int = 2
    device: str = "cpu"


class Subject:
    """The model and its prompts.

    Raises:
        CheckpointError, DataError: nothing usable at a path.
        ConfigError: drafts wanted of a model without MTP modules.
    """

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        checkpoint = open_checkpoint(settings.path)
        config = config_of(checkpoint)
        self.step, self.name = checkpoint.manifest.step, config.name
        self.trained_context = config.batch.seq_len
        self.transformer: Transformer = model_from(checkpoint, settings.device)
        self.model = InferenceModel(self.transformer)
        depth = self.transformer.config.mtp_depth
        if settings.drafts and not depth:
            raise ConfigError(f"--drafts {settings.drafts}: expected a model with MTP modules, got depth 0")
        self.drafts = settings.drafts or depth

    @cached_property
    def dataset(self) -> TokenDataset:
        """The validation split."""
        return TokenDataset.open(self.settings.data, "validation")

    def rows(self, count: int, tokens: int) -> Tensor:
        """Held-out rows, int64 [at most count, tokens], spread over the split.

        Raises:
            DataError: the split is shorter than one row, or of another vocabulary.
        """
        vocab = self.transformer.config.vocab_size
        loader = BatchLoader(self.dataset, tokens - 1, 0, seed=0, vocab_size=vocab)
        available = max(1, self.dataset.num_tokens // tokens)
        return token_ids(loader.rows(list(range(min(count, available)))))

    def requests(self, tokens: int, temperature: float, count: int | None = None) -> list[Request]:
        """Requests for `tokens` more after each prompt; the same prompts and seeds at every call."""
        rows = self.rows(count or self.settings.prompts, self.settings.prompt_tokens)
        return [
            Request(row, tokens, SamplingParams(temperature, seed=seed))
            for seed, row in enumerate(rows.tolist())
        ]
