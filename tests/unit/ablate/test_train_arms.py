"""What an arm is trained with."""

from dataclasses import replace

import pytest

from moe_runtime.cli.ablate.study import planned_runs, read_study
from moe_runtime.cli.ablate.train_arms import overrides_of
from moe_runtime.config.load import load_config
from tests.arch.sources import ROOT

STUDY = ROOT / "configs/run/ablations/mtp.yaml"


@pytest.mark.parametrize("key", ["b0d3503580c6", "143802080842", "1438020808e2"])
def test_a_run_is_named_by_its_key_even_if_that_looks_like_a_number(key, tmp_path):
    run = replace(planned_runs(read_study(STUDY), STUDY)[-1], key=key)
    config = load_config(run.base, overrides_of(run, tmp_path))
    assert config.name == key
    assert config.out_dir == str(tmp_path)
    assert config.model == run.config.model
