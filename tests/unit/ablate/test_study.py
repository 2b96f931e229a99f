"""Studies are read, refused with reasons, and know the same run by the same key."""

from pathlib import Path

import pytest
import yaml

from moe_runtime.cli.ablate.study import outcome_key, planned_runs, read_study
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from tests.arch.sources import ROOT

STUDIES = sorted(
    file
    for file in (ROOT / "configs/run/ablations").glob("*.yaml")
    if "arms" in yaml.safe_load(file.read_text())
)
BASE = ROOT / "configs/run/ablations/base.yaml"


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_study_of_the_repository_plans_its_runs(file):
    study = read_study(file)
    assert study.name == file.stem
    runs = planned_runs(study, file)
    assert len({run.key for run in runs}) == len(study.arms) * len(study.seeds) == len(runs)
    for seed in study.seeds:  # pairs: one data order and one initialisation a seed
        mine = [run.config for run in runs if run.seed == seed]
        assert {config.seed for config in mine} == {seed}
        assert all((config.data, config.batch) == (mine[0].data, mine[0].batch) for config in mine)


def _written(folder: Path, **changes: object) -> Path:
    values = {
        "name": "one",
        "question": "which?",
        "base": str(BASE),
        "seeds": [1, 2],
        "arms": {"a": [], "b": ["model.mtp_depth=1"]},
        "against": "a",
    }
    file = folder / "one.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"against": "c"}, "against: expected one of the arms a, b, got c"),
        ({"columns": ["loss"]}, "columns: expected of val_loss"),
        ({"seeds": [1, 1]}, "seeds: expected at least one, each once"),
        ({"seeds": []}, "seeds: expected at least one, each once"),
        ({"arms": {"a": [], "B b": []}}, "B b"),
        ({"surplus": 1}, "surplus"),
        ({"arms": None}, "arms"),
    ],
)
def test_mistakes_are_told_with_file_and_key(tmp_path, changes, said):
    with pytest.raises(ConfigError) as caught:
        read_study(_written(tmp_path, **changes))
    assert said in str(caught.value) and str(tmp_path / "one.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"a": [], "b": ["seed=7"]}, "arms.b: seed, name, out_dir are the study's to set, got seed=7"),
        ({"a": [], "b": ["data.path=elsewhere"]}, "arm b: expected the data of arm a"),
        ({"a": [], "b": ["train.log_every=7"]}, "arm b: expected a difference from arm a"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tmp_path, arms, said):
    file = _written(tmp_path, arms=arms)
    with pytest.raises(ConfigError) as caught:
        planned_runs(read_study(file), file)
    assert said in str(caught.value)


def test_a_wrong_override_names_its_arm(tmp_path):
    file = _written(tmp_path, arms={"a": [], "b": ["model.mpt_depth=1"]})
    with pytest.raises(ConfigError, match=r"one, arm b: .*mtp_depth"):
        planned_runs(read_study(file), file)


def test_a_base_is_looked_for_beside_the_study_and_keys_stand_once(tmp_path):
    file = _written(tmp_path, base="../none.yaml")
    with pytest.raises(ConfigError, match=r"base: expected a run config beside this file.*none\.yaml"):
        planned_runs(read_study(file), file)
    file.write_text(file.read_text() + "question: again\n")
    with pytest.raises(ConfigError, match="question"):
        read_study(file)


def test_no_study_there_or_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_study(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="expected a study with arms, got a run config"):
        read_study(BASE)


def test_the_key_is_that_of_the_outcome_alone():
    key = outcome_key(load_config(BASE))
    same = ["name=x", "out_dir=y", "train.log_every=3", "train.eval_every=7", "train.checkpoint_every=9"]
    assert outcome_key(load_config(BASE, [*same, "metrics.wandb=offline"])) == key
    for other in ("seed=2", "optim.peak_lr=1e-3", "train.total_steps=1999", "model.num_shared_experts=0"):
        assert outcome_key(load_config(BASE, [other])) != key, other
