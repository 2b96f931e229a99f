"""A page read back as a browser's script would read it."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

_VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """What of a page a test looks at; `mistakes` has tags that are not closed, or closed and not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.values: dict[str, str] = {}  # of <data>: what is shown, exact
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self.mistakes: list[str] = []
        self._open: list[str] = []
        self._script: str | None = None
        self.feed(text)
        self.mistakes += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "action") if name in given]
        if tag == "data":
            self.values[given["title"]] = given["value"]
        if tag == "script":
            self._script = given.get("id", "own")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._script = None
        if not self._open or self._open.pop() != tag:
            self.mistakes.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's pictures are made of."""
        return dict(json.loads(unpacked(self.scripts["packed-data"])))

    def curve(self, key: str) -> dict[int, float]:
        """The points of a curve."""
        data = self.data
        place, values, _ = data["curves"][key]
        return dict(zip(floats(data["steps"][place]), floats(values), strict=True))


def unpacked(letters: str) -> str:
    """Text that a page carries."""
    return gzip.decompress(base64.b64decode(letters)).decode()


def floats(letters: str) -> list[float]:
    """Numbers that a page carries."""
    return [float(value) for value in np.frombuffer(base64.b64decode(letters), dtype="<f8")]


def addresses(text: str) -> list[str]:
    """Whatever looks like an address outside the page."""
    return re.findall(r"(?:https?|ftp|wss?)://[^\s\"'<>]*|[\"'(]//[a-z][^\s\"'<>]*", text)
