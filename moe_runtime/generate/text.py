"""Text of tokens as they come, up to a stop string; what has been given out is never taken back.

Two things are held back: the bytes of a character that is not yet whole, and characters that may be the
beginning of a stop string. The stop string that ends first is the one that counts, and of several that end
there the longest; so the text does not depend on how tokens cut it.
"""

import codecs
from collections.abc import Sequence

from moe_runtime.generate.stop import check_stops, first_stop, possible_beginning


class TextStream:
    """Assembles the text of one sequence.

    It can be the `stops` of a request: called with each token, it keeps the text until `take`.

    Args:
        id_bytes: the bytes of each token; an id beyond them stands for none.
        stops: strings that end the text and are not part of it.

    Attributes:
        is_stopped: a stop string has come; nothing is given out any more.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, id_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        check_stops(stops)
        self._id_bytes = id_bytes
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._kept: list[str] = []
        self.is_stopped = False

    def __call__(self, token: int) -> bool:
        """Push a token, keep the text for `take`; whether a stop string has come."""
        self._kept.append(self.push(token))
        return self.is_stopped

    def take(self, finish: bool = False) -> str:
        """Text kept since the last call; with `finish`, what was held back too."""
        if finish:
            self._kept.append(self.finish())
        text = "".join(self._kept)
        self._kept.clear()
        return text

    def push(self, token: int) -> str:
        """Text that is certain with this token; nothing after a stop string."""
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
            cut = len(text) if is_last else len(text) - possible_beginning(text, self._stops)
        self._held = text[cut:]
        return text[:cut]
