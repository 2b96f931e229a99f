"""A rank process's way to the process that started it; no byte of it crosses a link.

parent  tell(word) ------------------>  hear()
        hear() <- all have come ------  barrier()
        hear() <----------------------  say(word)
"""

import json
import socket
import sys
from typing import Any


class Line:
    """The way to the process that started this one.

    Args:
        number: file descriptor of this rank's end of the socket pair.
    """

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._words = self._socket.makefile("r", encoding="utf-8")

    def hear(self) -> dict[str, Any]:
        """The next word of the parent; ends this process if the parent has gone."""
        said: dict[str, Any] = json.loads(self._next())
        return said

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._send(None)
        self._next()

    def say(self, word: dict[str, Any]) -> None:
        """Say a result."""
        self._send(word)

    def _send(self, word: dict[str, Any] | None) -> None:
        self._socket.sendall(json.dumps(word).encode() + b"\n")

    def _next(self) -> str:
        said = self._words.readline()
        if not said:
            sys.exit("the benchmark has ended")
        return said
