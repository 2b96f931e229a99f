"""Whether W&B can be used, without asking its server, and without a word of the key."""

import netrc
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from moe_runtime.cli.doctor.finding import Finding, ok

_HOST = "api.wandb.ai"


def look() -> Iterator[Finding]:
    """Findings about W&B."""
    try:
        installed = version("wandb")
    except PackageNotFoundError:
        yield Finding("W&B", "warn", "not installed: runs have metrics.jsonl alone", "pip install wandb")
        return
    mode = os.environ.get("WANDB_MODE") or "offline unless --wandb online"
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _is_logged_in()
    key = "a key is there" if has_key else "no key, which offline runs do not need"
    if has_key:
        yield ok("W&B", f"{installed}, {mode}; {key}")
    else:
        yield Finding("W&B", "note", f"{installed}, {mode}; {key}", "wandb login")
    waiting = [
        folder for folder in Path("runs").glob("*/wandb/offline-run-*") if not any(folder.glob("*.synced"))
    ]
    if waiting:
        said = f"{len(waiting)} offline runs below runs/ were not sent"
        yield Finding("W&B runs", "note", said, "wandb sync runs/*/wandb/offline-run-*")


def _is_logged_in() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or _HOST
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
