"""`config keys`, `config show --where`: what keys there are, and where values come from."""

from pathlib import Path

import pytest

from moe_runtime.config.keys import all_keys, choices_of, find_keys
from moe_runtime.config.load import load_config
from moe_runtime.config.origins import leaves, origins
from moe_runtime.errors import ConfigError
from tests.unit.config.samples import write


def test_every_key_of_a_run_is_listed_once_with_its_default(tmp_path: Path) -> None:
    run = load_config(write(tmp_path / "a.yaml", model={"yarn": {}}))
    names = [key.name for key in all_keys()]
    assert len(names) == len(set(names))
    present = {name for name, _ in leaves(run.model_dump(mode="json"))}
    # Where several sections may stand none does by default; the key that says so is no key of a section.
    assert present - set(names) <= {"data.mixture", "alerts.custom"}
    bare = dict(leaves(load_config(write(tmp_path / "b.yaml")).model_dump(mode="json")))
    for key in all_keys():
        if (
            not key.required
            and key.name in bare
            and not key.name.startswith(("model", "batch", "train", "data"))
        ):
            assert key.default == bare[key.name], key


@pytest.mark.parametrize(
    ("prefix", "first", "count"),
    [
        ("layout.pp", "layout.pp", 1),
        ("layout.s", "layout.schedule", 1),
        ("recompute", "recompute.norm", 3),
        ("recompute.", "recompute.norm", 3),
        ("model.yarn", "model.yarn.factor", 5),
        ("RECOMPUTE", "recompute.norm", 3),
        ("straggler_ratio", "reliability.straggler_ratio", None),
    ],
)
def test_keys_are_found_by_section_start_or_word(prefix: str, first: str, count: int | None) -> None:
    found = find_keys(prefix)
    assert found[0].name == first and count in (None, len(found))


@pytest.mark.parametrize(("prefix", "hint"), [("optm", "did you mean optim?"), ("zzzz", "sections: name, ")])
def test_a_word_about_no_key_is_told(prefix: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="expected a key") as caught:
        find_keys(prefix)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("key", "takes", "choices"),
    [
        ("layout.pp", "whole number, above 0", ()),
        ("optim.betas", "list of 2 x number, 0 to 1", ()),
        ("recompute.norm", "true or false", ("true", "false")),
        ("layout.zero_stage", "one of 1, 2", ("1", "2")),
        ("data.source", "text or null", ("null",)),
        ("alerts.spike.action", None, ("log", "wandb", "checkpoint", "stop", "roll_back")),
        ("data.mixture.NAME.weight", "number, at least 0", ()),
    ],
)
def test_what_a_key_takes_is_told_in_words(key: str, takes: str | None, choices: tuple[str, ...]) -> None:
    (found,) = find_keys(key)
    assert takes in (None, found.takes)
    assert choices_of(tuple(key.split("."))) == choices


def test_each_value_is_traced_to_its_line_its_override_or_the_default(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", optim={"eps": 0.1})
    top = tmp_path / "top.yaml"
    top.write_text("bases: [base.yaml]\noptim:\n  grad_clip: 0.3\n")
    places = origins(top, ["train.total_steps=7", "model.yarn={factor: 2}"])
    line = base.read_text().splitlines().index("  eps: 0.1") + 1
    assert places["optim.eps"] == (0.1, f"{base}:{line}")
    assert places["optim.grad_clip"] == (0.3, f"{top}:3")
    assert places["train.total_steps"] == (7, "override")
    assert places["model.yarn.factor"] == (2.0, "override")
    assert places["model.yarn.beta_fast"] == (32.0, "default")
    assert places["seed"] == (1234, "default")
