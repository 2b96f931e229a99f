"""Models measured one after the other, so that memory holds one at a time."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.load import config_of
from moe_runtime.cli.evaluating.models import context_of, language_model, open_ours
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.comparison import Column, Comparison, Row, likelihood_rows, task_rows
from moe_runtime.evaluation.documents import Text, read_texts
from moe_runtime.evaluation.foreign_model import ForeignModel, context_of_folder, is_transformers_folder
from moe_runtime.evaluation.language_model import LanguageModel
from moe_runtime.evaluation.task_items import Item, read_items, with_examples
from moe_runtime.evaluation.task_scores import Score, score_items
from moe_runtime.evaluation.windows import RULE, document_nats

MIN_CONTEXT = 2


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; see `compare --help`."""

    paths: Sequence[Path]
    data: Sequence[Path]
    tasks: Sequence[Path]
    documents: int | None
    max_bytes: int
    context: int | None
    shots: int
    device: str
    ema: bool


@dataclass(frozen=True)
class Measured:
    """What one model gave: nats of each text of each set, scores of each item of each file."""

    column: Column
    nats: list[list[float]]
    scores: list[list[Score]]


def compare_models(wanted: Wanted) -> Comparison:
    """Measure every model on everything.

    Raises:
        ConfigError, DataError, CheckpointError: a path, the data or an item does not do; nothing is written
            then.
    """
    texts = [
        read_texts(TokenDataset.open(folder, "validation"), wanted.documents, wanted.max_bytes)
        for folder in wanted.data
    ]
    items = [with_examples(read_items(file), wanted.shots, file) for file in wanted.tasks]
    context = shared_context([_context(path) for path in wanted.paths], wanted.context)
    labels = labels_of(wanted.paths)
    measured = []
    for path, label in zip(wanted.paths, labels, strict=True):
        measured.append(_measure(path, label, wanted, texts, items, context))
        gc.collect()  # models hold cycles; the next one may need the room
    rows: list[Row] = []
    for place, folder in enumerate(wanted.data):
        rows += likelihood_rows(str(folder), texts[place], [one.nats[place] for one in measured])
    for place, file in enumerate(wanted.tasks):
        rows += task_rows(str(file), [one.scores[place] for one in measured])
    rule = RULE.format(context=context) if wanted.data else ""
    return Comparison(
        tuple(one.column for one in measured), tuple(rows), rule, _notes(wanted, texts, measured)
    )


def shared_context(contexts: Sequence[int], wanted: int | None) -> int:
    """Tokens of a window that every model can read.

    Raises:
        ConfigError: a model cannot read as many as are wanted.
    """
    least = min(contexts)
    if wanted is not None and not MIN_CONTEXT <= wanted <= least:
        raise ConfigError(f"--context: expected {MIN_CONTEXT} to {least}, what all models see, got {wanted}")
    return wanted or least


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path; the whole path where short ones would be the same."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _context(path: Path) -> int:
    if is_transformers_folder(path):
        return context_of_folder(path)
    config = config_of(open_checkpoint(path))
    return context_of(config.model, config)


def _measure(
    path: Path, label: str, wanted: Wanted, texts: list[list[Text]], items: list[list[Item]], context: int
) -> Measured:
    model, kind, parameters = _open(path, wanted)
    nats = [document_nats(model, each, context) for each in texts]
    scores = [score_items(model, each) for each in items]
    return Measured(Column(label, str(path), kind, model.context, parameters), nats, scores)


def _open(path: Path, wanted: Wanted) -> tuple[LanguageModel, str, int]:
    """The model, what it is, and how many parameters it has."""
    if is_transformers_folder(path):
        foreign = ForeignModel(path, wanted.device)
        return foreign, f"transformers, {foreign.architecture}", foreign.parameters
    opened = open_ours(path, wanted.device, wanted.ema)
    step = f"step {opened.checkpoint.manifest.step}" + (", averaged" if wanted.ema else "")
    # MTP modules take no part in any figure here, and an export's reader does not load them.
    named = opened.model.named_parameters()
    count = sum(one.numel() for name, one in named if not name.startswith("mtp."))
    return language_model(opened, str(path)), f"moe_runtime, {step}", count


def _notes(wanted: Wanted, texts: list[list[Text]], measured: list[Measured]) -> tuple[str, ...]:
    notes = []
    if texts:
        number, size = sum(map(len, texts)), sum(text.num_bytes for each in texts for text in each)
        notes.append(
            f"Texts: {number:,} documents of validation splits, evenly spread, each up to "
            f"{wanted.max_bytes:,} bytes from its beginning; {size:,} bytes in all. Each "
            "model reads them with its own tokenizer."
        )
    if wanted.shots:
        notes.append(f"Tasks: the first {wanted.shots} items of each file are examples before the others.")
    for one in measured:
        cut = sum(score.is_cut for each in one.scores for score in each)
        ties = sum(score.ties for each in one.scores for score in each)
        if cut:
            notes.append(f"{one.column.label}: items cut from the left to what it sees: {cut}.")
        if ties:
            notes.append(f"{one.column.label}: ties, where the first of the best was taken: {ties}.")
    return tuple(notes)
