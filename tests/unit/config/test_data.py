"""Keys of data: one set or a mixture, and what is wrong between them, said in one line."""

from collections.abc import Sequence

import pytest

from moe_runtime.config.load import dump_config, load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.tree import parse_text
from moe_runtime.errors import ConfigError

BARE = ("data.path=null", "data.source=null")


def load(*overrides: str) -> RunConfig:
    return load_config("quickstart", (*BARE, *overrides))


def said(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    return str(error.value)


def test_sets_have_names_weights_and_keys_of_their_own() -> None:
    run = load("data.mixture.web={path: w, weight: 3}", "data.mixture.code={path: c, fim_rate: 0.1}")
    sets = run.data.sets()
    assert {name: one.path for name, one in sets.items()} == {"web": "w", "code": "c"}
    assert (sets["web"].fim_rate, sets["code"].fim_rate) == (0.0, 0.1)
    assert [run.data.mixture[name].weight for name in sets] == [3.0, 1.0]
    assert run.data.claims("web") == {"tokenizer"} and run.data.claims("code") == {"tokenizer", "fim_rate"}
    assert RunConfig.model_validate(parse_text(dump_config(run), str).values) == run


def test_a_list_of_sets_is_called_by_name_or_folder() -> None:
    run = load("data.mixture=[{path: x/web, weight: 2}, {path: y/web, name: more}]")
    assert [(name, one.path) for name, one in run.data.mixture.items()] == [
        ("web", "x/web"),
        ("more", "y/web"),
    ]


@pytest.mark.parametrize(
    "overrides, text",
    [
        ((), "data.path: set data.path, or data.mixture"),
        (("data.mixture={a: {path: x}}", "data.path=y"), "data.path: is for a single set; give each set"),
        (("data.mixture={a: {path: x}}", "data.source=y"), "data.source: is for a single set; give each"),
        (("data.mixture={a: {path: x, weight: 0}}",), "data.mixture: expected a set with a weight above 0"),
        (("data.mixture={a: {weight: 2}}",), "data.mixture.a.path: required key is missing"),
        (("data.mixture.a={path: x, wieght: 2}",), "unknown key; did you mean data.mixture.a.weight?"),
        (("data.mixture={a b: {path: x}}",), "text of the form"),
        (("data.mixture=[{path: x/web}, {path: y/web}]",), "data.mixture: two sets are called web; give"),
        (("data.path=x", "data.form.loss_on=[a]"), "data.form.loss_on: expected some of text, got a"),
        (("data.path=x", "data.form.fields=[]"), "data.form.fields: expected a list"),
        (("data.path=x", "data.form.fields=[messages, text]"), "data.form.fields: expected messages alone"),
        (
            ("data.path=x", "data.form.message_format=none"),
            "data.form.message_format: expected {content} once",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_key(overrides: Sequence[str], text: str) -> None:
    assert text in said(*overrides)
