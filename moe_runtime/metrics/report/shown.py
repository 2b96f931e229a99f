"""Text and numbers as a page or a terminal may show them, whoever wrote them."""

import json
import unicodedata
from typing import Any

from moe_runtime.config.secrets import redact

_LONGEST = 4000  # characters of one text
# Characters that turn the direction of what follows, so that text looks like other text.
_TURNS = {"\u200e", "\u200f", "\u061c", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def visible(text: str, longest: int = _LONGEST) -> str:
    """The text with secrets taken out and everything that is no visible character written as an escape.

    Escaping for HTML is left to the template. Half a surrogate pair, which JSON may hold and UTF-8 may not,
    is among the escapes.
    """
    cut = text[:longest]
    more = f" … ({len(text) - longest:,} characters more)" if len(text) > longest else ""
    return unhidden(redact(cut)) + more


def unhidden(text: str) -> str:
    """The text with everything that is no visible character written as an escape."""
    return "".join(_escaped(char) if _is_hidden(char) else char for char in text)


def as_text(value: Any) -> str:
    """A JSON value: text as it is, anything else as JSON."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def exact(value: float) -> str:
    """A number as metrics.jsonl has it, to the last digit; whole numbers without a point."""
    if value != value or value in (float("inf"), float("-inf")):
        return "not finite"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)


def rounded(value: float) -> str:
    """A number for reading: whole ones with separators, others with four digits that count."""
    if value != value or value in (float("inf"), float("-inf")):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _is_hidden(char: str) -> bool:
    return char not in "\t\n" and (unicodedata.category(char) in ("Cc", "Cs") or char in _TURNS)


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]
