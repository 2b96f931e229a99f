"""Models beyond their old length: all on the same windows, all asked the same questions."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.cli.long_context.record import Measured, NeedleCell, Record
from moe_runtime.cli.own_tokenizer import own_tokenizer
from moe_runtime.config.schema import YarnConfig
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import DataError
from moe_runtime.evaluation.by_position import loss_by_position
from moe_runtime.evaluation.needle import Haystack, NeedleForm, ask
from moe_runtime.model.inference import InferenceModel

BATCH_WINDOWS = 8
SEED = 0  # of windows and questions: the same ones in every call


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        data: folder of prepared data whose validation text gives the windows.
        needle_data: the same for the text in which needles are planted.
        lengths: of questions, tokens; the first is the old length, the last that of windows.
        windows: how many.
        depths: where needles are planted; questions: so many of each length and depth.
        factor: of YaRN that is put on models without any, as further models; None: none.
        device: cpu or cuda.
    """

    data: Path
    needle_data: Path
    lengths: tuple[int, ...]
    windows: int
    depths: tuple[float, ...]
    questions: int
    factor: float | None = None
    form: NeedleForm = field(default_factory=NeedleForm)
    device: str = "cpu"


@dataclass(frozen=True)
class Subject:
    """A model to be measured: its checkpoint, and the name that a user gave it."""

    label: str
    named: str
    checkpoint: Checkpoint
    trained: bool = True


def subjects(named: list[tuple[str, Path]], settings: Settings) -> Iterator[Subject]:
    """Open the checkpoints that (label, path) name; those without YaRN come a second time with it."""
    for label, path in named:
        subject = Subject(label, str(path), open_checkpoint(path))
        yield subject
        if settings.factor is not None and config_of(subject.checkpoint).model.yarn is None:
            yarn = YarnConfig(factor=settings.factor, original_seq_len=settings.lengths[0])
            checkpoint = with_yarn(subject.checkpoint, yarn)
            yield replace(subject, label=f"{label}, YaRN untrained", checkpoint=checkpoint, trained=False)


def with_yarn(checkpoint: Checkpoint, yarn: YarnConfig) -> Checkpoint:
    """The same weights read as a model with YaRN."""
    config = checkpoint.manifest.config
    changed = config | {"model": config["model"] | {"yarn": yarn.model_dump(mode="json")}}
    # Unvalidated, as all of `config` is in a manifest: `config_of` validates it.
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"config": changed}))


def measure(
    named: list[tuple[str, Path]], settings: Settings, tell: Callable[[str], None] = lambda line: None
) -> Record:
    """Measure models; `tell` hears of each when it is begun."""
    text = TokenDataset.open(settings.data, "validation")
    haystack = Haystack(TokenDataset.open(settings.needle_data, "validation"), settings.form, SEED)
    found = []
    for subject in subjects(named, settings):
        tell(f"{subject.label}: {subject.named}")
        found.append(_measure_one(subject, settings, text, haystack))
    return Record(
        str(settings.data), str(settings.needle_data), settings.lengths, settings.form, tuple(found)
    )


def _measure_one(subject: Subject, settings: Settings, text: TokenDataset, haystack: Haystack) -> Measured:
    checkpoint = subject.checkpoint
    config = config_of(checkpoint)
    for dataset in (text, haystack.dataset):
        check_tokenizer(checkpoint, dataset)
    model = model_from(checkpoint, settings.device)
    loader = BatchLoader(text, settings.lengths[-1], 0, SEED, config.model.vocab_size)
    if settings.windows > loader.samples_per_epoch:
        raise DataError(
            f"{text.folder}: expected {settings.windows} windows of {settings.lengths[-1]} tokens in the "
            f"validation split, got {loader.samples_per_epoch}; lower --windows"
        )
    batches = loader.validation_batches(settings.windows, BATCH_WINDOWS)
    position = loss_by_position(model, batches, settings.lengths[0])
    cached = InferenceModel(model)
    cells = tuple(
        _ask(cached, haystack, length, depth, settings.questions)
        for length in settings.lengths
        for depth in settings.depths
    )
    return Measured(
        label=subject.label,
        checkpoint=subject.named,
        step=checkpoint.manifest.step,
        seq_len=config.batch.seq_len,
        seed=config.seed,
        yarn=config.model.yarn,
        trained=subject.trained,
        position=position,
        needle=cells,
    )


def check_tokenizer(checkpoint: Checkpoint, dataset: TokenDataset) -> None:
    """Refuse ids of another tokenizer; a checkpoint that carries none (imported) is taken at its word.

    Raises:
        DataError: they are another's.
    """
    own = own_tokenizer(checkpoint)
    if own is not None and json.loads(own.to_json()) != json.loads(dataset.load_tokenizer().to_json()):
        raise DataError(
            f"{dataset.folder}: expected ids of the tokenizer that {checkpoint.path} was trained with, "
            f"got those of {dataset.manifest.tokenizer.name}; prepare the data with that tokenizer"
        )


def _ask(model: InferenceModel, haystack: Haystack, length: int, depth: float, questions: int) -> NeedleCell:
    found = ask(model, haystack.trials(length, depth, questions))
    return NeedleCell(length, depth, questions, sum(found.preferred), sum(found.returned))
