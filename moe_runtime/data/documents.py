"""What a document is, and how an object of JSON (or a row of Parquet) becomes one.

Spans say which characters are to be predicted. They come from `form` (fields or roles), or from the object
itself: `loss_spans` beside its text, `loss` in a message. A document without spans is predicted as a whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_runtime.config.data import TextForm
from moe_runtime.data.vocabulary import scalar_text
from moe_runtime.errors import DataError

Spans = tuple[tuple[int, int], ...]
PLAIN = TextForm()


class Document(NamedTuple):
    """One text of a source.

    Args:
        name: says where it came from, for messages.
        part: of the source that it belongs to: the first folder below the root ('.' for files that lie
            there), what a line of JSON says under `source`, else the file. Losses are told apart by it.
        spans: characters [first, end) that are targets, in order, disjoint; None: all of them.
    """

    name: str
    text: str
    part: str
    spans: Spans | None = None


def document_of(value: Any, form: TextForm, name: str, where: str, file: str) -> Document:
    """The document in one object.

    Args:
        name: of the document.
        where: file and place, for messages.
        file: the part, where the object names no `source`.

    Raises:
        DataError: no object, or not the text that the form expects.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with {_wanted(form)}, got {type(value).__name__}")
    said = value.get("source")
    part = scalar_text(said) if isinstance(said, str) and said else file
    if "messages" in form.fields:
        pieces = _messages(value, form, where)
    else:
        pieces = [
            (_string(value, key, form, where), form.loss_on is None or key in form.loss_on)
            for key in form.fields
        ]
    text, spans = _joined(pieces)
    if "loss_spans" in value:
        if form != PLAIN:
            raise DataError(f"{where}: expected loss_spans beside a single text, got them with data.form set")
        spans = _given_spans(value["loss_spans"], text, where)
    return Document(name, text, part, None if spans == ((0, len(text)),) else spans)


def pieces_of(document: Document) -> list[tuple[str, bool]]:
    """The text cut where targets begin and end: (text, are its tokens targets); one piece at least."""
    if document.spans is None:
        return [(document.text, True)]
    pieces, place = [], 0
    for first, end in document.spans:
        pieces += [(document.text[place:first], False), (document.text[first:end], True)]
        place = end
    pieces.append((document.text[place:], False))
    return [piece for piece in pieces if piece[0]] or [("", False)]


def _string(value: Mapping[str, Any], key: str, form: TextForm, where: str) -> str:
    if not isinstance(value.get(key), str):
        got = f"{type(value[key]).__name__} under {key!r}" if key in value else f"keys {sorted(value)[:8]}"
        hint = "; set --fields messages (data.form.fields)" if "messages" in value and form == PLAIN else ""
        raise DataError(f"{where}: expected an object with {_wanted(form)}, got {got}{hint}")
    return scalar_text(value[key])


def _messages(value: Mapping[str, Any], form: TextForm, where: str) -> list[tuple[str, bool]]:
    """Each message's frame, which is no target, and its content with what follows it."""
    messages = value.get("messages")
    if not isinstance(messages, list):
        got = f"{type(messages).__name__}" if "messages" in value else f"keys {sorted(value)[:8]}"
        raise DataError(f"{where}: expected a list under 'messages', got {got}")
    targets = ("assistant",) if form.loss_on is None else form.loss_on
    pieces = []
    for number, message in enumerate(messages):
        fine = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not fine or not isinstance(message.get("loss", True), bool):
            raise DataError(
                f"{where}: message {number}: expected strings under 'role' and 'content' (and true or false "
                f"under 'loss', if there), got {str(message)[:80]}"
            )
        role, content = scalar_text(message["role"]), scalar_text(message["content"])
        before, after = form.message_format.replace("{role}", role).split("{content}")
        pieces += [(before, False), (content + after, message.get("loss", role in targets))]
    return pieces


def _joined(pieces: list[tuple[str, bool]]) -> tuple[str, Spans | None]:
    """All text, and where its targets lie."""
    spans: list[tuple[int, int]] = []
    place = 0
    for text, is_target in pieces:
        if is_target and text:
            if spans and spans[-1][1] == place:
                spans[-1] = (spans[-1][0], place + len(text))
            else:
                spans.append((place, place + len(text)))
        place += len(text)
    return "".join(text for text, _ in pieces), tuple(spans) if place else None


def _given_spans(value: Any, text: str, where: str) -> Spans:
    """Spans as an object gives them: ascending, disjoint, within the text."""
    place, spans = 0, []
    for span in value if isinstance(value, list) else [value]:
        fine = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not fine or not place <= span[0] <= span[1] <= len(text):
            raise DataError(
                f"{where}: loss_spans: expected [first, end] pairs of characters in order within "
                f"0..{len(text)}, got {str(span)[:40]}"
            )
        place = span[1]
        if span[0] < span[1]:
            spans.append((span[0], span[1]))
    return tuple(spans)


def _wanted(form: TextForm) -> str:
    if "messages" in form.fields:
        return "a list under 'messages'"
    return "a string under " + " and ".join(repr(key) for key in form.fields)
