"""What is asked of a model, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moe_runtime.generate.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Args:
        tokens: the prompt, at least one token.
        max_new_tokens: at most so many, at least 1.
        params: how tokens are drawn.
        stop_ids: tokens that end it and are not given out, such as the end of a document.
        stops: told each token that is given out, in order; True ends the sequence with it.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 256
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    stops: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("expected at least one token to continue, got none")
        if self.max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")


@dataclass
class Continuation:
    """What came of a request, and at what cost.

    Attributes:
        tokens: new tokens.
        finish_reason: "stop" by a stop id or `stops`, "length" by `max_new_tokens`; None: still going on.
        prompt_cache_hit_tokens: tokens of the prompt whose latents were found.
        prompt_cache_miss_tokens: the other tokens of the prompt.
        passes: passes of the main model after the prompt's.
        drafted, accepted: drafts by position within a pass, and how many of them stood.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_cache_miss_tokens: int = 0
    passes: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens for each pass of the main model; the first came with the prompt's."""
        return (len(self.tokens) - 1) / self.passes if self.passes else float("nan")

    def take(self, request: Request, tokens: Sequence[int]) -> list[int]:
        """Append tokens until the request ends; returns those that were given out."""
        given: list[int] = []
        for token in tokens:
            if token in request.stop_ids:
                self.finish_reason = "stop"
                break
            given.append(token)
            self.tokens.append(token)
            if request.stops is not None and request.stops(token):
                self.finish_reason = "stop"
                break
            if len(self.tokens) == request.max_new_tokens:
                self.finish_reason = "length"
                break
        return given

    def count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """One pass that verified `num_drafts` drafts."""
        self.passes += 1
        missing = num_drafts - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for position in range(num_drafts):
            self.drafted[position] += 1
            self.accepted[position] += position < num_accepted
