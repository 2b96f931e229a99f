"""A page that follows a run, for browsers of this machine alone.

It listens on the loopback interface, and answers only requests that name it as such, so that no page from
elsewhere can read a run by pointing a name of its own at 127.0.0.1. It has the page, its news, and the few
files of a run that the page links to, each by its name: no path from a request ever reaches the file system.
"""

import gzip
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from moe_runtime.errors import ConfigError
from moe_runtime.metrics.report.files import SERVED
from moe_runtime.metrics.report.html import page, update
from moe_runtime.metrics.report.packing import as_json
from moe_runtime.metrics.report.run_state import run_state
from moe_runtime.metrics.report.run_view import RunView, signature_of

HOST, PORT = "127.0.0.1", 8712
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_BLOCK = 1 << 16
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class ReportServer(ThreadingHTTPServer):
    """Serves the report of one run folder.

    Args:
        run_dir: the run folder.
        port: 0 takes one that is free.

    Raises:
        OSError: the port cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run_dir: Path, port: int) -> None:
        self.run_dir = run_dir
        self._view = RunView(run_dir)
        self._looking = threading.Lock()  # browsers ask at the same time; a view is read by one
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> bytes:
        """The page as of now."""
        with self._looking:
            self._view.look()
            return page(self._view, None).encode()

    def news(self, have: str) -> bytes | None:
        """What is new, compressed; None if nothing has changed since the signature `have`."""
        with self._looking:
            signature = self._signature()
            if signature == have:
                return None
            self._view.look()
            told = update(self._view, have) | {"signature": signature}
            return gzip.compress(as_json(told).encode(), compresslevel=3)

    def _signature(self) -> str:
        state = run_state(self.run_dir, self._view.journal.lines, self._view.history.last_step)
        return f"{signature_of(self.run_dir)}-{state.word.replace(' ', '')}"


def open_server(run_dir: Path, port: int | None) -> ReportServer:
    """A server of a run folder, listening.

    Args:
        port: None: `PORT`, or any that is free.

    Raises:
        ConfigError: a port that was asked for cannot be had.
    """
    try:
        return ReportServer(run_dir, PORT if port is None else port)
    except OSError as error:
        if port is None:
            return ReportServer(run_dir, 0)
        got = error.strerror or str(error)
        text = f"--port {port}: expected a port that is free, got: {got}; leave it out for one that is free"
        raise ConfigError(text) from None


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version = "moe-runtime"
    sys_version = ""
    timeout = 30.0

    def do_HEAD(self) -> None:
        """What GET answers, without its body, which `_body` leaves out."""
        self.do_GET()

    def do_GET(self) -> None:
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this report is for this machine alone\n")
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page())
        elif asked.path == "/news":
            self._send_news(parse_qs(asked.query).get("have", [""])[0])
        elif asked.path[1:] in SERVED:
            self._send_file(self.server.run_dir / asked.path[1:])
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests: the terminal is for the person."""

    def _is_for_us(self) -> bool:
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return name in _NAMES

    def _send_news(self, have: str) -> None:
        news = self.server.news(have)
        if news is None:
            self._send(HTTPStatus.NO_CONTENT, "text/plain", b"")
        else:
            self._send(HTTPStatus.OK, "application/json", news, {"Content-Encoding": "gzip"})

    def _send_file(self, path: Path) -> None:
        try:
            file = path.open("rb")
        except OSError:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"the run has no such file\n")
            return
        with file:
            self._start(HTTPStatus.OK, "text/plain; charset=utf-8", {})
            while block := file.read(_BLOCK):
                self._body(block)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self._start(status, kind, {"Content-Length": str(len(body)), **(more or {})})
        self._body(body)

    def _body(self, body: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: HTTPStatus, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **_HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()
