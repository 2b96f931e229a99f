"""Text of tokens as they come, up to a stop string; what has been given out is never taken back.

Two things are held back: the bytes of a character that is not yet whole, and characters that may be the
beginning of a stop string. The stop string that ends first is the one that counts, and of several that end
there the longest; so the text does not depend on how tokens cut it.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence


class TextStream:
    """Assembles the text of one sequence.

    Args:
        id_bytes: the bytes of each token; an id beyond them stands for none.
        stops: strings that end the text and are not part of it; none may be empty.
    """

    def __init__(self, id_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._id_bytes = id_bytes
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Text that is certain now; nothing after a stop string."""
        if not 0 <= token < len(self._id_bytes):
            return ""
        return self._release(self._decoder.decode(self._id_bytes[token]), is_last=False)

    def finish(self) -> str:
        """The rest: what was held back; half a character becomes U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), is_last=True)

    def _release(self, new: str, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        if not self._stops:
            return new
        text = self._held + new
        cut = first_stop(text, self._stops)
        self.is_stopped = cut is not None
        if cut is None:
            cut = len(text) if is_last else len(text) - _possible_beginning(text, self._stops)
        self._held = text[cut:]
        return text[:cut]


def text_pieces(id_bytes: Sequence[bytes], ids: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come; a character split over tokens waits for its last byte."""
    stream = TextStream(id_bytes)
    for token in ids:
        yield stream.push(token)
    yield stream.finish()


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that ends first in `text`, the longest of those; None if there is none."""
    found = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _possible_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
