"""The JSON schema says to an editor what the loader says to a user."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moe_runtime.config.json_schema import file_schema, run_schema
from moe_runtime.config.load import load_config
from tests.unit.config.samples import ROOT, values

SCHEMA_FILE = ROOT / "configs" / "schema.json"
MODELINE = "# yaml-language-server: $schema="
_FILES = [
    file
    for folder in ("run", "model")
    for file in sorted((ROOT / "configs" / folder).rglob("*.yaml"))
    if "arms" not in yaml.safe_load(file.read_text())
]


class _Yaml12(yaml.SafeLoader):
    """Scalars as YAML 1.2 has them, which editors read: no `off`, no `1_000`."""


_Yaml12.yaml_implicit_resolvers = {}
for tag, pattern in (
    ("null", r"^(?:null|~|)$"),
    ("bool", r"^(?:true|false)$"),
    ("int", r"^[-+]?[0-9]+$"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), None)


_OF_FILE = jsonschema.Draft202012Validator(file_schema())
_OF_RUN = jsonschema.Draft202012Validator(run_schema())


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(_OF_FILE.schema)


def test_the_file_in_the_repository_is_that_of_the_code() -> None:
    command = "moe-runtime config schema --out configs/schema.json"
    assert json.loads(SCHEMA_FILE.read_text()) == file_schema(), f"run: {command}"


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)
def test_an_editor_finds_no_fault_in_our_configs_and_knows_the_schema_by_their_first_line(file: Path) -> None:
    text = file.read_text()
    _OF_FILE.validate(yaml.load(text, Loader=_Yaml12))
    first = text.splitlines()[0]
    assert first.startswith(MODELINE), f"expected {MODELINE}... as the first line of {file}"
    assert (file.parent / first.removeprefix(MODELINE)).resolve() == SCHEMA_FILE


def test_a_resolved_run_is_valid_by_both_schemas() -> None:
    run = load_config("quickstart").model_dump(mode="json")
    _OF_RUN.validate(run)
    _OF_FILE.validate(run)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("optim", {"peak_lrr": 1}),
        ("optim", {"peak_lr": "high"}),
        ("optim", {"peak_lr": 0}),
        ("layout", {"schedule": "dualpip"}),
        ("batch", {"seq_len": 1.5}),
        ("recompute", {"norm": 1}),
        ("alerts", {"spike": {"action": "shout"}}),
        ("optm", {"peak_lr": 1}),
        ("bases", "model/tiny.yaml"),
    ],
)
def test_an_editor_finds_what_the_loader_refuses(section: str, wrong: Any) -> None:
    assert not _OF_FILE.is_valid(values() | {section: wrong})


@pytest.mark.parametrize(
    ("section", "right"),
    [
        ("bases", ["model/tiny.yaml"]),
        ("recipe", {"cosine_tokens": "950_000", "constant_until_tokens": "469e9"}),
        ("optim", {"peak_lr": 1e-4}),
        ("alerts", {"spike": {"action": "stop"}}),
        ("alerts", {"spike": {"action": ["log", "stop"]}}),
        ("data", {"mixture": {"code": {"path": "x"}}}),
        ("data", {"mixture": [{"path": "x", "name": "code"}]}),
        ("model", {"yarn": None}),
    ],
)
def test_an_editor_accepts_what_the_loader_takes(section: str, right: Any) -> None:
    _OF_FILE.validate({section: right})


def test_every_key_says_what_it_is() -> None:
    schema = run_schema()
    parts = {"run": schema, **schema["$defs"]}
    silent = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, value in part["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert not silent
