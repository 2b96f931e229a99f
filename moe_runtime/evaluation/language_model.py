"""What evaluation asks of a model, ours or another's, and how a text is put to it.

**One cut between context and continuation.** The two are tokenised together, and what lies beyond as many
tokens as the context alone has is the continuation; white space at the end of the context goes to the
continuation first, since tokenizers join a space to the word after it. This is the rule of
lm-evaluation-harness, taken over so that both score the same tokens. Where a token crosses the border the two
tokenisations differ and the rule is only an approximation of p(continuation | context); with bytes it is
exact.

**One window.** A model sees at most `context` tokens. What is longer loses its beginning, and the loss is
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_runtime.errors import DataError


@dataclass(frozen=True)
class Pair:
    """A continuation to be scored.

    Args:
        context: ids before it, at least one.
        continuation: its ids, at least one.
        is_cut: the context has lost its beginning.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    is_cut: bool = False


@dataclass(frozen=True)
class Prompt:
    """A text to be continued greedily.

    Args:
        context: ids, at least one.
        stop: strings that end the text and are not part of it.
        max_tokens: new tokens at most.
    """

    context: tuple[int, ...]
    stop: tuple[str, ...]
    max_tokens: int
    is_cut: bool = False


class LanguageModel(Protocol):
    """A causal model with its tokenizer.

    Attributes:
        name: where it comes from.
        context: tokens that it sees at most.
        start_id: stands before a text that has nothing before it.
    """

    name: str
    context: int
    start_id: int

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of a text; `at_start` with those that the tokenizer puts before every text, if any."""
        ...

    def spell(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes that ids stand for, control ids left out."""
        ...

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        """Natural logarithm of the probability of each continuation after its context."""
        ...

    def continue_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """What greedy decoding says after each context, up to a stop string or the end of the text."""
        ...

    def token_nats(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Cross-entropy of every token of each window but its first, in nats."""
        ...


def pair_of(model: LanguageModel, context: str, continuation: str, where: str) -> Pair:
    """A continuation as the model sees it.

    Raises:
        DataError: the continuation alone is longer than the model's window.
    """
    before, after = split_ids(model, context, continuation)
    if len(after) > model.context:
        raise DataError(
            f"{where}: expected texts to score of at most {model.context} tokens, what {model.name} sees, "
            f"got one of {len(after)}; shorten it"
        )
    room = model.context + 1 - len(after)
    return Pair(tuple(before[-room:]), tuple(after), len(before) > room)


def split_ids(model: LanguageModel, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of context and continuation, neither of them empty, cut as the module says."""
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    if not context:
        return [model.start_id], model.encode(continuation, at_start=False)
    before = model.encode(context, at_start=True)
    after = model.encode(context + continuation, at_start=True)[len(before) :]
    return before, after or model.encode(continuation, at_start=False)


def prompt_of(
    model: LanguageModel, context: str, stop: tuple[str, ...], max_tokens: int, where: str
) -> Prompt:
    """A context to continue, with room left for what is to come.

    Raises:
        DataError: the new tokens alone fill the model's window.
    """
    room = model.context - max_tokens
    if room < 1:
        raise DataError(
            f"{where}: expected max_tokens below {model.context}, what {model.name} sees, got {max_tokens}"
        )
    ids = model.encode(context, at_start=True) or [model.start_id]
    return Prompt(tuple(ids[-room:]), stop, max_tokens, len(ids) > room)
