"""Items scored, and what that comes to.

    acc        the right choice has the highest log-probability
    acc_norm   ... the highest per byte of its text, so that long choices have a chance
    exact      what was generated is the target, white space at both ends aside

Of choices that tie the first is taken, as lm-evaluation-harness does it; how many items were decided so is
said, for a model that finds all choices alike otherwise looks as good as the order of the answers makes it.

A share of few items has Wilson's interval: it stays honest where all are right or none, where a bootstrap
would have no width. Differences of models are paired by item (`comparison.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.errors import NumericsError
from moe_runtime.evaluation.intervals import Interval, share_interval
from moe_runtime.evaluation.language_model import LanguageModel, Pair, Prompt, pair_of, prompt_of
from moe_runtime.evaluation.task_items import ChoiceItem, Item, TargetItem


@dataclass(frozen=True)
class ChoiceScore:
    """What came of an item with choices.

    Args:
        log_likelihoods: of each choice, in nats.
        by_sum, by_bytes: places of the best choice, by log-probability and by that per byte.
        ties: the best choice by log-probability is not alone.
        is_cut: the context lost its beginning for some choice.
    """

    item: ChoiceItem
    log_likelihoods: tuple[float, ...]
    by_sum: int
    by_bytes: int
    ties: bool
    is_cut: bool

    @property
    def metrics(self) -> dict[str, float]:
        """1 where it is right."""
        right = self.item.answer
        return {"acc": float(self.by_sum == right), "acc_norm": float(self.by_bytes == right)}


@dataclass(frozen=True)
class TargetScore:
    """What came of an item with a target: the text that was generated."""

    item: TargetItem
    text: str
    is_cut: bool
    ties: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """1 where it is right."""
        return {"exact": float(self.text.strip() == self.item.target.strip())}


Score = ChoiceScore | TargetScore


@dataclass(frozen=True)
class TaskResult:
    """The figures of one file.

    Args:
        metrics: shares of right items with their intervals.
        items: how many each figure is of.
        ties: items that the order of the choices decided.
        cut: items whose context lost its beginning.
    """

    metrics: dict[str, Interval]
    items: dict[str, int]
    ties: int
    cut: int


def score_items(model: LanguageModel, items: Sequence[Item]) -> list[Score]:
    """Score items of both kinds, in their order.

    Raises:
        DataError: an item does not fit the model's window.
        NumericsError: the model gives something that is no number.
    """
    pairs: list[tuple[ChoiceItem, list[Pair]]] = []
    prompts: list[tuple[TargetItem, Prompt]] = []
    for item in items:
        if isinstance(item, ChoiceItem):
            pairs.append(
                (item, [pair_of(model, item.context, choice, item.where) for choice in item.choices])
            )
        else:
            prompt = prompt_of(model, item.context, item.stop, item.max_tokens, item.where)
            prompts.append((item, prompt))
    likelihood_list = model.log_likelihoods([pair for _, each in pairs for pair in each])
    if any(math.isnan(value) for value in likelihood_list):
        raise NumericsError(f"{model.name}: expected log-likelihoods that are numbers, got nan")
    likelihoods = iter(likelihood_list)
    texts = model.continue_texts([prompt for _, prompt in prompts])
    found: dict[str, Score] = {}
    for item, each in pairs:
        found[item.where] = choose(item, [next(likelihoods) for _ in each], any(one.is_cut for one in each))
    for (item, prompt), text in zip(prompts, texts, strict=True):
        found[item.where] = TargetScore(item, text, prompt.is_cut)
    return [found[item.where] for item in items]


def choose(item: ChoiceItem, log_likelihoods: Sequence[float], is_cut: bool) -> ChoiceScore:
    """The best choices; the first of equal ones."""
    places = range(len(item.choices))
    per_byte = [
        value / len(choice.encode()) for value, choice in zip(log_likelihoods, item.choices, strict=True)
    ]
    best = max(log_likelihoods)
    return ChoiceScore(
        item=item,
        log_likelihoods=tuple(log_likelihoods),
        by_sum=log_likelihoods.index(best),
        by_bytes=max(places, key=per_byte.__getitem__),
        ties=sum(value == best for value in log_likelihoods) > 1,
        is_cut=is_cut,
    )


def summarise(scores: Sequence[Score]) -> TaskResult:
    """The figures of some items, at least one."""
    columns: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.metrics.items():
            columns.setdefault(name, []).append(value)
    return TaskResult(
        metrics={name: share_interval(values) for name, values in sorted(columns.items())},
        items={name: len(values) for name, values in sorted(columns.items())},
        ties=sum(score.ties for score in scores),
        cut=sum(score.is_cut for score in scores),
    )
