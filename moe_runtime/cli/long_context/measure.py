"""Models beyond their old length: all on the same windows, all asked the same questions."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.cli.evaluating.models import check_tokenizer
from moe_runtime.cli.long_context.record import Measured, NeedleCell, Record, Terms
from moe_runtime.config.schema import YarnConfig
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import ConfigError, DataError
from moe_runtime.evaluation.by_position import loss_by_position
from moe_runtime.evaluation.needle import Haystack, ask
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.targets import token_ids

BATCH_WINDOWS = 8
SEED = 0  # of windows and questions: the same ones in every call


Key = tuple[str, str, YarnConfig | None]


@dataclass(frozen=True)
class Subject:
    """A model to be measured: its checkpoint, and the name that a user gave it."""

    label: str
    named: str
    checkpoint: Checkpoint
    trained: bool = True


def subjects(named: list[tuple[str, Path]], original: int, factor: float | None) -> Iterator[Subject]:
    """Open the checkpoints that (label, path) name.

    Args:
        original: old length, which YaRN is told.
        factor: those without YaRN come a second time with it, of this factor; None: they do not.
    """
    for label, path in named:
        subject = Subject(label, str(path), open_checkpoint(path))
        yield subject
        if factor is not None and config_of(subject.checkpoint).model.yarn is None:
            checkpoint = with_yarn(subject.checkpoint, YarnConfig(factor=factor, original_seq_len=original))
            yield replace(subject, label=f"{label}, YaRN untrained", checkpoint=checkpoint, trained=False)


def with_yarn(checkpoint: Checkpoint, yarn: YarnConfig) -> Checkpoint:
    """The same weights read as a model with YaRN."""
    config = checkpoint.manifest.config
    changed = config | {"model": config["model"] | {"yarn": yarn.model_dump(mode="json")}}
    # Unvalidated, as all of `config` is in a manifest: `config_of` validates it.
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"config": changed}))


def measure(wanted: Sequence[Subject], terms: Terms, device: str, known: Record | None) -> Iterator[Record]:
    """Measure models one after the other.

    Args:
        known: of an earlier call; a model that it holds on the same terms is not measured again.

    Yields:
        what is known so far, in the order of `wanted`: at first of an earlier call, at last of all.
    """
    text = TokenDataset.open(terms.data, "validation")
    haystack = Haystack(TokenDataset.open(terms.needle_data, "validation"), terms.form, SEED)
    keys = [_key_of(subject) for subject in wanted]
    for subject, key in zip(wanted, keys, strict=True):
        if keys.count(key) > 1:
            raise ConfigError(
                f"{subject.label}={subject.named}: expected each model once, got the same weights twice; "
                "they would count as two seeds"
            )
    earlier = {} if known is None or known.terms != terms else {_key(one): one for one in known.models}
    found = [earlier.get(key) for key in keys]
    yield _so_far(terms, found)
    for number, subject in enumerate(wanted):
        if found[number] is None:
            found[number] = _measure_one(subject, terms, device, text, haystack)
            yield _so_far(terms, found)


def _so_far(terms: Terms, found: Sequence[Measured | None]) -> Record:
    return Record(terms, tuple(one for one in found if one is not None))


def _key(one: Measured) -> Key:
    return one.label, one.weights, one.yarn


def _key_of(subject: Subject) -> Key:
    """What two models share only if they are the same one."""
    return subject.label, _digest(subject.checkpoint), config_of(subject.checkpoint).model.yarn


def _digest(checkpoint: Checkpoint) -> str:
    """The beginning of a sha256 over those of all files that hold weights."""
    files = sorted((name, entry.sha256) for name, entry in checkpoint.manifest.files.items())
    weights = [digest for name, digest in files if checkpoint.manifest.files[name].kind == "weights"]
    return hashlib.sha256("".join(weights).encode()).hexdigest()[:16]


def _measure_one(
    subject: Subject, terms: Terms, device: str, text: TokenDataset, haystack: Haystack
) -> Measured:
    checkpoint = subject.checkpoint
    config = config_of(checkpoint)
    for dataset in (text, haystack.dataset):
        check_tokenizer(checkpoint, dataset)
    model = model_from(checkpoint, device)
    loader = BatchLoader(text, terms.lengths[-1], 0, SEED, config.model.vocab_size)
    if terms.windows > loader.samples_per_epoch:
        raise DataError(
            f"{text.folder}: expected {terms.windows} windows of {terms.lengths[-1]} tokens in the "
            f"validation split, got {loader.samples_per_epoch}; lower --windows"
        )
    batches = map(token_ids, loader.validation_batches(terms.windows, BATCH_WINDOWS))
    position = loss_by_position(model, batches, terms.lengths[0])
    cached = InferenceModel(model)
    cells = tuple(
        _ask(cached, haystack, length, depth, terms.questions)
        for length in terms.lengths
        for depth in terms.depths
    )
    return Measured(
        label=subject.label,
        checkpoint=subject.named,
        weights=_digest(checkpoint),
        step=checkpoint.manifest.step,
        seq_len=config.batch.seq_len,
        seed=config.seed,
        yarn=config.model.yarn,
        trained=subject.trained,
        position=position,
        needle=cells,
    )


def _ask(model: InferenceModel, haystack: Haystack, length: int, depth: float, questions: int) -> NeedleCell:
    found = ask(model, haystack.trials(length, depth, questions))
    return NeedleCell(length, depth, questions, sum(found.preferred), sum(found.returned))
