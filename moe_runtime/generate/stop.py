"""When a sequence ends: a stop token, a stop string, so many tokens, or a full context."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_runtime.errors import ConfigError
from moe_runtime.generate.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class StopConditions:
    """What ends a sequence.

    Args:
        max_tokens: new tokens, at least 1.
        ids: tokens that end it and are not given out, such as the end of a document.
        texts: strings that end it and are not part of its text, wherever tokens cut them.
        context_length: tokens of the prompt and new ones together; None: no limit.

    Raises:
        ConfigError: no tokens to make, or an empty stop string.
    """

    max_tokens: int
    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if "" in self.texts:
            raise ConfigError("stop: expected strings of at least one character, got an empty one")

    def token_limit(self, prompt_tokens: int) -> int:
        """New tokens that fit after a prompt.

        Raises:
            ConfigError: none do.
        """
        if self.context_length is None:
            return self.max_tokens
        if prompt_tokens >= self.context_length:
            raise ConfigError(
                f"prompt: expected at most {self.context_length - 1} tokens, one less than the context, got "
                f"{prompt_tokens}; shorten it"
            )
        return min(self.max_tokens, self.context_length - prompt_tokens)


class Output:
    """What one sequence has given out so far.

    Attributes:
        tokens: new tokens without a stop token; the last may reach into or beyond a stop string.
        text: all pieces given out.
        finish_reason: "stop" for a stop token or string, "length" for a limit, None while it goes on.

    Args:
        conditions: what ends it.
        id_bytes: the bytes of each token.
        prompt_tokens: tokens before the new ones.

    Raises:
        ConfigError: the prompt fills the context.
    """

    def __init__(self, conditions: StopConditions, id_bytes: Sequence[bytes], prompt_tokens: int = 0) -> None:
        self._ids = conditions.ids
        self._stream = TextStream(id_bytes, conditions.texts)
        self._limit = conditions.token_limit(prompt_tokens)
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still come; 0 when finished."""
        return 0 if self.finish_reason else self._limit - len(self.tokens)

    def push(self, token: int) -> str:
        """Take the next token; the text that became certain. A finished output takes none."""
        if self.finish_reason is not None:
            return ""
        if token in self._ids:
            return self._finish("stop", "")
        self.tokens.append(token)
        piece = self._stream.push(token)
        if self._stream.is_stopped:
            return self._finish("stop", piece)
        if len(self.tokens) == self._limit:
            return self._finish("length", piece)
        return self._give(piece)

    def extend(self, tokens: Iterable[int]) -> str:
        """Take tokens until one finishes it, such as those that a speculative pass accepted."""
        return "".join(self.push(token) for token in tokens)

    def _finish(self, reason: FinishReason, piece: str) -> str:
        piece += self._stream.finish()
        self.finish_reason = "stop" if self._stream.is_stopped else reason
        return self._give(piece)

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


def stream_text(output: Output, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as tokens come; asks for no token after the end, and gives out no empty piece."""
    for token in tokens:
        if piece := output.push(token):
            yield piece
        if output.finish_reason is not None:
            return
