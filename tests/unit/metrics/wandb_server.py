"""A stand-in for W&B's server on loopback: enough of GraphQL to save and find a workspace."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Views:
    """What was saved.

    Args:
        url: of the server.
        saved: variables of each saving.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.saved: list[dict[str, Any]] = []

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To one query."""
        if "upsertView" in query:
            self.saved.append(variables)
            return {"upsertView": {"view": {"id": "view-1", "name": "nw-abc-v"}, "inserted": True}}
        if "allViews" in query:
            newest = {"id": "view-1", "displayName": "old", "spec": self.saved[-1]["spec"]}
            return {"project": {"allViews": {"edges": [{"node": newest}]}}}
        return {"viewer": {"id": "1", "entity": "somebody", "username": "somebody", "teams": {"edges": []}}}


@contextmanager
def wandb_server() -> Iterator[Views]:
    """A server for the time of the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                data = {"data": views.answer(asked["query"], asked.get("variables") or {})}
            text = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    views = Views(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield views
    finally:
        server.shutdown()
        server.server_close()
