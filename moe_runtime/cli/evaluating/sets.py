"""Prepared sets measured with a checkpoint of ours: each set, each source within it, all together."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.cli.evaluating.models import OpenModel, check_tokenizer
from moe_runtime.data.loader import VALIDATION_SEED, BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import NumericsError
from moe_runtime.evaluation.loss import evaluate
from moe_runtime.evaluation.tally import EvalResult, Tally, by_part

BATCH_SEQUENCES = 4


@dataclass(frozen=True)
class SetFigures:
    """What one prepared set gave."""

    data: str
    tally: Tally
    total: EvalResult
    sources: dict[str, EvalResult]


def measure_set(opened: OpenModel, data: Path, sequences: int | None) -> SetFigures:
    """Run a model over the validation split of a prepared set.

    Args:
        sequences: at most so many; None: all.

    Raises:
        DataError: no prepared data there, or ids of another tokenizer.
        NumericsError: the model gives something that is no number.
    """
    dataset = TokenDataset.open(data, "validation")
    check_tokenizer(opened.checkpoint, dataset)
    config, model = opened.config, opened.config.model
    loader = BatchLoader(dataset, config.batch.seq_len, model.mtp_depth, VALIDATION_SEED, model.vocab_size)
    wanted = loader.samples_per_epoch if sequences is None else sequences
    tally = evaluate(opened.model, loader, wanted, BATCH_SEQUENCES)
    if not np.isfinite(tally.nats).all():
        raise NumericsError(
            f"{opened.checkpoint.path}: expected finite losses on {data}, got nan or infinity"
        )
    parts = {name: part.result() for name, part in by_part(tally, *dataset.document_parts()).items()}
    return SetFigures(str(data), tally, tally.result(), parts)


def total_of(figures: list[SetFigures]) -> EvalResult:
    """All sets together, every token alike."""
    return Tally.joined([one.tally for one in figures]).result()


def sets_report(figures: list[SetFigures]) -> dict[str, Any]:
    """The keys of the report: those of the total, `sets` and `sources`."""
    names = [one.data for one in figures]
    return {
        "data": names[0] if len(names) == 1 else names,
        **plain(total_of(figures)),
        "sets": [{"data": one.data, **plain(one.total)} for one in figures],
        "sources": [
            {"data": one.data, "source": name, **plain(result)}
            for one in figures
            for name, result in one.sources.items()
        ],
    }


def set_lines(figures: list[SetFigures], step: int) -> list[str]:
    """A line for each set, and for all; below a set, its sources if there are several."""
    lines = []
    for one in figures:
        counted = f"({one.total.tokens:,} tokens of {one.data})"
        lines.append(f"step {step}: {_said(one.total)} {counted} {_interval(one.total)}")
        if len(one.sources) > 1:
            width = max(map(len, one.sources))
            lines += [
                f"  {name:{width}}  {_said(result)} {_interval(result)}"
                for name, result in one.sources.items()
            ]
    if len(figures) > 1:
        total = total_of(figures)
        lines.append(f"total: {_said(total)} {_interval(total)} ({total.tokens:,} tokens)")
    return lines


def plain(result: EvalResult) -> dict[str, Any]:
    """Its fields for JSON, which has no word for what is not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(result).items()
    }


def _said(result: EvalResult) -> str:
    means = f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f}"
    return f"{means}, {result.bits_per_byte:.3f} bits per byte"


def _interval(result: EvalResult) -> str:
    if math.isnan(result.bits_per_byte_low):
        return "[one document]"
    ends = f"{result.bits_per_byte_low:.3f} to {result.bits_per_byte_high:.3f}"
    return f"[{ends}, {result.documents:,} documents]"
