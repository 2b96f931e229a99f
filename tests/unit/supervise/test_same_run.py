"""Machines that were given different configs are told which keys differ."""

import pytest

from moe_runtime.cli.supervise.same_run import check_same
from moe_runtime.config.difference import differences, say_differences
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError


def test_every_key_that_differs_is_named_with_both_values() -> None:
    theirs = load_config("quickstart").model_dump(mode="json")
    ours = load_config("quickstart", ["seed=5", "optim.peak_lr=1e-5"]).model_dump(mode="json")
    assert differences(theirs, theirs) == []
    assert differences(theirs, ours) == [
        f"seed: expected {theirs['seed']}, got 5",
        f"optim.peak_lr: expected {theirs['optim']['peak_lr']}, got 1e-05",
    ]
    with pytest.raises(ConfigError) as caught:
        check_same(theirs, ours, "--master a:1")
    assert str(caught.value).startswith("--master a:1: this machine has another config than machine 0: seed:")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("start all with the same command")


def test_a_key_that_only_one_has_differs() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == [
        "a.b: expected 1, got null",
        "a.c: expected null, got 2",
    ]


def test_many_keys_are_counted() -> None:
    theirs, ours = ({str(key): key + more for key in range(8)} for more in (0, 1))
    assert say_differences(theirs, ours).endswith("4: expected 4, got 5 and 3 more keys")
    assert say_differences(theirs, theirs) == ""


def test_another_run_on_the_same_port_is_told() -> None:
    with pytest.raises(ConfigError, match="expected run two, got run one; choose another port"):
        check_same({"name": "one", "seed": 1}, {"name": "two", "seed": 2}, "--master a:1")
