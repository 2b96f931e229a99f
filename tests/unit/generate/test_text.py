"""Streamed text and stop strings: the same text however tokens cut it, and nothing taken back."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.generate.request import Continuation, Request
from moe_runtime.generate.text import TextStream

BYTES = [bytes([value]) for value in range(256)]
# Few characters, so that stop strings begin often and rarely go on; of one, two and four bytes in UTF-8.
LETTERS = st.sampled_from("abé🙂")
TEXTS = st.text(LETTERS, max_size=24)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3).map(tuple)
CUTS = st.lists(st.integers(0, 100), max_size=12)


def cut_oracle(text: str, stops: tuple[str, ...]) -> str:
    """Let characters come one by one until a stop string stands at the end; the longest is cut off."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return text[: end - max(map(len, here))]
    return text


def tokens_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[begin:end] for begin, end in pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(TEXTS, STOPS, CUTS)
def test_streamed_text_is_the_text_cut_at_the_first_stop_string(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    vocabulary = tokens_of(text.encode(), cuts)
    stream = TextStream(vocabulary, stops)
    expected, given_out = cut_oracle(text, stops), ""
    for token in range(len(vocabulary)):
        given_out += stream.push(token)
        assert expected.startswith(given_out), "what was given out must be taken back"
    assert stream.is_stopped == (expected != text)
    assert given_out + stream.finish() == expected


def text_of(vocabulary: Sequence[bytes], ids: Iterable[int]) -> str:
    stream = TextStream(vocabulary)
    return "".join(stream.push(token) for token in ids) + stream.finish()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=24), CUTS)
def test_any_bytes_stream_as_their_text(raw: bytes, cuts: list[int]) -> None:
    vocabulary = tokens_of(raw, cuts)
    assert text_of(vocabulary, range(len(vocabulary))) == raw.decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(TEXTS, STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stops: tuple[str, ...]) -> None:
    stream = TextStream(BYTES, stops)
    held = text[len("".join(stream.push(byte) for byte in text.encode())) :]
    if not stream.is_stopped:
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def answer(stream: TextStream, tokens: bytes, **options: int) -> Continuation:
    """What a request makes of tokens that come two at a time, as from a speculative pass."""
    request, result = Request([0], stop_ids=frozenset({10}), stops=stream, **options), Continuation()
    for begin in range(0, len(tokens), 2):
        if result.finish_reason is None:
            result.take(request, list(tokens[begin : begin + 2]))
    return result


def test_a_stop_string_ends_a_request_within_a_pass() -> None:
    stream = TextStream(BYTES, [".c"])
    result = answer(stream, b"aab.cd")
    assert (result.finish_reason, bytes(result.tokens)) == ("stop", b"aab.c")
    assert stream.take() == "aab" and stream.take(finish=True) == ""


def test_a_stop_token_or_a_limit_gives_out_what_was_held_back() -> None:
    stream = TextStream(BYTES, ["bcd"])
    assert answer(stream, b"abc\n").finish_reason == "stop"
    assert (stream.take(), stream.take(), stream.take(finish=True)) == ("a", "", "bc")
    stream = TextStream(BYTES, ["bcd"])
    assert answer(stream, b"abcdef", max_new_tokens=3).finish_reason == "length"
    assert stream.take(finish=True) == "abc"


def test_a_stop_string_within_a_token_cuts_it() -> None:
    stream = TextStream([b"abc"], ["b"])
    assert stream(0) and stream.take(finish=True) == "a"


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert text_of(BYTES, "a🙂".encode()[:3]) == "a�"


def test_ids_beyond_the_tokenizer_stand_for_nothing() -> None:
    assert text_of(BYTES[:100], [97, 300, -1, 98]) == "ab"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop: expected strings of at least one character"):
        TextStream(BYTES, ["a", ""])
