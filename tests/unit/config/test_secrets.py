"""Secrets are refused in configs, without being repeated, and taken out of what is written."""

from pathlib import Path

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.secrets import find_secrets, redact
from moe_runtime.errors import ConfigError

PLANTED = "planted5521value"
NAMED = ("metrics.wandb_api_key", "hf_token", "data.password", "train.aws_secret", "token", "x.access_token")
TOKENS = ("hf_" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "0123456789abcdef0123456789abcdef01234567")


@pytest.mark.parametrize("key", NAMED)
def test_a_key_that_is_named_like_a_secret_is_refused_without_its_value(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [f"{key}={PLANTED}"])
    assert key in str(caught.value) and "environment" in str(caught.value)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("value", [*TOKENS, "s3://me:planted5521value@host/data"])
def test_a_value_that_looks_like_a_secret_is_refused_wherever_it_stands(value: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load_config("quickstart", [f"data.path={value}"])
    assert value not in str(caught.value)


def test_the_line_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"bases: [run/quickstart.yaml]\nmetrics:\n  wandb_key_secret: {PLANTED}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: metrics\.wandb_key_secret") as caught:
        load_config(file)
    assert PLANTED not in str(caught.value)


def test_no_key_and_no_default_of_ours_is_taken_for_a_secret() -> None:
    config = load_config("v3_671b")
    assert not list(find_secrets(config.model_dump(mode="json")))
    assert set(RunConfig.model_fields) <= set(config.model_dump())


def test_values_of_secret_variables_are_taken_out_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", PLANTED)
    monkeypatch.setenv("HARMLESS", "visible-text")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact(f"got {PLANTED}, visible-text, abc") == "got [SOME_API_KEY], visible-text, abc"
