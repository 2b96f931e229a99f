"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

from moe_runtime.config.schema import RunConfig
from tests.arch.sources import ROOT
from tests.docs.pages import PAGES, anchors_of, code_in_sentences, links_of, name_of

_FOLDERS = ("moe_runtime/", "comm/", "docs/", "tests/", "configs/", "benchmarks/", ".ci/")
_FILES = (".py", ".yaml", ".jsonl", ".json", ".md")
_PATH = re.compile(r"[\w./-]+")
_KEY = re.compile(r"^([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:=.*)?$")


def test_the_documents_are_found() -> None:
    names = {name_of(page) for page in PAGES}
    assert {"README.md", "docs/README.md", "docs/howto/cluster.md", "comm/README.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for link in links_of(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = [text for text in code_in_sentences(page) if text.startswith(_FOLDERS) and _PATH.fullmatch(text)]
    assert not [text for text in named if not (ROOT / text).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_config_keys_that_are_named_exist(page: Path) -> None:
    keys = [match[1] for text in code_in_sentences(page) if (match := _KEY.match(text))]
    fields = RunConfig.model_fields.items()
    sections = {name for name, field in fields if hasattr(field.annotation, "model_fields")}
    ours = [key for key in keys if key.partition(".")[0] in sections and Path(key).suffix not in _FILES]
    assert not [key for key in ours if not key_exists(key)]


def key_exists(key: str) -> bool:
    """Whether an override may name it; a map has keys of the user's own."""
    section = RunConfig
    if key.startswith("data.mixture."):  # whose next word is a name that the user gives
        key = re.sub(r"^data\.mixture\.\w+", "data.mixture", key)
    for part in key.split("."):
        fields = getattr(section, "model_fields", None)
        if fields is None:
            return False
        if part not in fields:
            return False
        if "dict[" in str(fields[part].annotation):
            return True
        section = _model_in(fields[part].annotation)
    return True


def _model_in(annotation: object) -> object:
    """The section in an annotation such as `Section | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    inner = [_model_in(each) for each in getattr(annotation, "__args__", ())]
    return next((each for each in inner if each is not None and hasattr(each, "model_fields")), None)
