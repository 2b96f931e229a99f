"""A real browser for tests: the system's chromium, driven by playwright and watched."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRAWN = "body[data-drawn=all]"


@dataclass
class Watched:
    """A page, the warnings and errors of its console, and what it asked for since it was opened."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def chromium() -> str:
    """Where chromium is; the test is skipped, with the reason, where it is not."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium): the page was not opened")
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless chromium."""
    path = chromium()
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser: extra `test`"
    )
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(opened: Any, address: str, **context: Any) -> Watched:
    """A page in a context of its own; nothing is waited for but its load."""
    watched = Watched(opened.new_context(**context).new_page())
    watched.page.set_default_timeout(120_000)  # other tests may have the processor
    watched.page.on("console", lambda message: _note(watched, message.type, message.text))
    watched.page.on("pageerror", lambda error: watched.said.append(f"error: {error}"))
    watched.page.on("request", lambda request: watched.asked.append(request.url))
    watched.page.goto(address)
    return watched


def _note(watched: Watched, kind: str, text: str) -> None:
    if kind in ("warning", "error"):
        watched.said.append(f"{kind}: {text}")
