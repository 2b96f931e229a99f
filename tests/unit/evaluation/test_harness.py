"""lm-evaluation-harness on an exported model and our scorer on its checkpoint agree, item by item."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.data.hugging_face import hub_files
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.harness_tasks import write_tasks
from moe_runtime.evaluation.task_items import read_items, with_examples
from moe_runtime.evaluation.task_scores import ChoiceScore, score_items
from tests.unit.evaluation import samples
from tests.unit.evaluation.samples import BYTES, item_lines, saved, small_bpe, wrapped, write_items

SHOTS = 1


def exported(folder: Path, tokenizer: Tokenizer) -> Path:
    options = ExportOptions(eos_id=tokenizer.eos_id, files=hub_files(tokenizer))
    export_model(saved(folder / "run", tokenizer), folder / "hub", options)
    return folder / "hub"


def test_the_harness_and_our_scorer_agree_to_the_item(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tokenizers = {"bytes": BYTES, "bpe": small_bpe()}
    file = write_items(tmp_path / "items.jsonl", item_lines(24, 8))
    items = with_examples(read_items(file), SHOTS, file)
    pairs = []
    for name, tokenizer in tokenizers.items():
        write_tasks(items, name, tmp_path / "tasks")
        pairs.append(f"{name}={exported(tmp_path / name, tokenizer)}")
    theirs = run_harness(tmp_path, pairs)
    for name, tokenizer in tokenizers.items():
        assert set(theirs[name]) == {item.id for item in items}
        scores = score_items(wrapped(tokenizer), items)
        for score in scores:
            found = theirs[name][score.item.id]
            if isinstance(score, ChoiceScore):
                assert list(score.log_likelihoods) == pytest.approx(found["log_likelihoods"], abs=1e-4)
                assert score.metrics == {"acc": found["acc"], "acc_norm": found["acc_bytes"]}
                best = found["log_likelihoods"]
                assert score.by_sum == best.index(max(best))
            else:
                assert score.text == found["text"]
                assert score.metrics == {"exact": found["exact_match"]}
        assert any(score.is_cut for score in scores) and not all(score.is_cut for score in scores)
        right = [score.metrics["acc"] for score in scores if isinstance(score, ChoiceScore)]
        assert 0 < sum(right) < len(right)  # neither side says the same of everything


def run_harness(folder: Path, pairs: list[str]) -> dict[str, Any]:
    case, out = Path(samples.__file__).with_name("harness_case.py"), folder / "found.json"
    done = subprocess.run(
        [sys.executable, case, folder / "tasks", out, *pairs],
        env=os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_items_that_differ_in_settings_become_a_group(tmp_path: Path) -> None:
    items = read_items(write_items(tmp_path / "items.jsonl", item_lines(3, 4)))
    assert write_tasks(items, "mine", tmp_path / "tasks") == ["mine_1", "mine_2", "mine_3"]
    group = yaml.safe_load((tmp_path / "tasks/mine.yaml").read_text())
    assert group == {"group": "mine", "task": ["mine_1", "mine_2", "mine_3"]}
    until = [yaml.safe_load((tmp_path / f"tasks/mine_{n}.yaml").read_text()) for n in (2, 3)]
    assert [one["generation_kwargs"]["until"] for one in until] == [[], ["\n", "e"]]
    assert write_tasks(items[:3], "only", tmp_path / "tasks") == ["only"]
    with pytest.raises(ConfigError, match="--name: expected letters"):
        write_tasks(items, "a/b", tmp_path / "tasks")
