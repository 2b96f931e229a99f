"""A small corpus of Python text, prepared once for all tests of the room."""

import json
import sysconfig
from pathlib import Path

import pytest

from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request

SHARD_TOKENS = 30_000  # several shards, borders in mid-document


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of two packages of the standard library, about 0.2 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted([*root.glob("json/*.py"), *root.glob("asyncio/[a-q]*.py")])
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": f.read_text(encoding="utf-8")}) + "\n" for f in files))
    return file


@pytest.fixture(scope="session")
def byte_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as bytes, a quarter of it for validation."""
    out = tmp_path_factory.mktemp("prepared") / "byte"
    prepare(Request(str(corpus), "byte", validation_fraction=0.25), out, shard_tokens=SHARD_TOKENS)
    return out


@pytest.fixture(scope="session")
def bpe_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as a BPE of 400 ids with half of the training documents rewritten for infill."""
    out = tmp_path_factory.mktemp("prepared") / "bpe"
    request = Request(str(corpus), "bpe:400", fim_rate=0.5, validation_fraction=0.25)
    prepare(request, out, shard_tokens=SHARD_TOKENS)
    return out
