"""Runs tasks in lm-evaluation-harness in a process of its own, in which nothing can reach a network.

Arguments: folder of tasks, file to write, then TASK=MODEL_FOLDER pairs. The file gets, by task and id of the
    item,
what the harness made of it.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"


class NoNetwork(socket.socket):
    """A socket that connects nowhere."""

    def connect(self, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    connect_ex = connect  # type: ignore[assignment]


def main(tasks: Path, out: Path, pairs: list[str]) -> None:
    # Not `simple_evaluate`: it asks pip and git about the machine, which takes as long as all the rest.
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        task, _, model = pair.partition("=")
        language_model = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4)
        result = evaluate(lm=language_model, task_dict=get_task_dict([task], manager), bootstrap_iters=0)
        assert result is not None
        samples = [one for some in result["samples"].values() for one in some]
        found[task] = {one["doc"]["id"]: _kept(one) for one in samples}
    out.write_text(json.dumps(found))


def _kept(sample: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: float(sample[name]) for name in ("acc", "acc_bytes", "exact_match") if name in sample}
    if "exact_match" in sample:
        return metrics | {"text": sample["resps"][0][0]}
    return metrics | {"log_likelihoods": [float(one[0][0]) for one in sample["resps"]]}


if __name__ == "__main__":
    socket.socket = NoNetwork  # type: ignore[misc]
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
