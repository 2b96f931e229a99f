"""Stop conditions and streamed text: the same text however tokens cut it, and nothing taken back."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.generate.stop import Output, StopConditions, stream_text
from moe_runtime.generate.text import text_pieces

BYTES = [bytes([value]) for value in range(256)]
# Few characters, so that stop strings begin often and rarely go on; of one, two and four bytes in UTF-8.
LETTERS = st.sampled_from("abé🙂")
TEXTS = st.text(LETTERS, max_size=24)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3).map(tuple)


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


@settings(max_examples=300, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=12))
def test_streamed_text_is_the_text_cut_at_the_first_stop_string(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    vocabulary = tokens_of(text.encode(), cuts)
    output = Output(StopConditions(max(1, len(vocabulary)), texts=stops), vocabulary)
    expected, given_out = cut_oracle(text, stops), ""
    for token in range(len(vocabulary)):
        given_out += output.push(token)
        assert expected.startswith(given_out), "what was given out must be taken back"
    if vocabulary:
        assert given_out == output.text == expected
        assert output.finish_reason == ("stop" if expected != text else "length")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=24), st.lists(st.integers(0, 100), max_size=12))
def test_any_bytes_stream_as_their_text(raw: bytes, cuts: list[int]) -> None:
    vocabulary = tokens_of(raw, cuts)
    assert "".join(text_pieces(vocabulary, range(len(vocabulary)))) == raw.decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(TEXTS, STOPS, st.integers(0, 24))
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(
    text: str, stops: tuple[str, ...], length: int
) -> None:
    text = text[:length]
    output = Output(StopConditions(1000, texts=stops), BYTES)
    output.extend(text.encode())
    if output.finish_reason is None:
        held = text[len(output.text) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_token_ends_it_and_is_not_given_out() -> None:
    output = Output(StopConditions(9, ids=frozenset({10})), BYTES)
    assert output.extend(b"ab\ncd") == "ab"
    assert (output.tokens, output.finish_reason, output.tokens_left) == ([97, 98], "stop", 0)


def test_a_stop_token_gives_out_what_was_held_back() -> None:
    output = Output(StopConditions(9, ids=frozenset({10}), texts=("bcd",)), BYTES)
    assert [output.push(token) for token in b"abc\n"] == ["a", "", "", "bc"]


def test_limits_end_it_with_length() -> None:
    output = Output(StopConditions(3), BYTES)
    assert output.extend(b"abcdef") == "abc" and output.finish_reason == "length"
    output = Output(StopConditions(30, context_length=10), BYTES, prompt_tokens=8)
    assert output.tokens_left == 2
    assert output.extend(b"abcdef") == "ab" and output.finish_reason == "length"


def test_a_stop_string_within_the_last_token_counts_as_stop() -> None:
    output = Output(StopConditions(1, texts=("b",)), [b"abc"])
    assert output.push(0) == "a" and output.finish_reason == "stop" and output.tokens == [0]


def test_half_a_character_at_the_end_is_replaced() -> None:
    output = Output(StopConditions(2), BYTES)
    assert output.extend("a🙂".encode()) == "a�" and output.finish_reason == "length"


def test_ids_beyond_the_tokenizer_stand_for_nothing() -> None:
    output = Output(StopConditions(9), BYTES[:100])
    assert output.extend([97, 300, -1, 98]) == "ab" and output.tokens == [97, 300, -1, 98]


def test_a_finished_stream_asks_for_no_more_tokens() -> None:
    asked = []

    def tokens() -> Iterator[int]:
        for token in b"ab.cd":
            asked.append(token)
            yield token

    output = Output(StopConditions(9, texts=(".",)), BYTES)
    assert list(stream_text(output, tokens())) == ["a", "b"] and bytes(asked) == b"ab."


def test_conditions_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens: expected at least 1, got 0"):
        StopConditions(0)
    with pytest.raises(ConfigError, match="stop: expected strings of at least one character"):
        StopConditions(1, texts=("a", ""))
    with pytest.raises(ConfigError, match=r"prompt: expected at most 9 tokens.* got 10; shorten it"):
        Output(StopConditions(1, context_length=10), BYTES, prompt_tokens=10)
