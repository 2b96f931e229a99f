"""What a run under faults decided, as overrides that let another run decide the same.

A step whose gradient was not finite changed nothing, and a roll-back passed over some data. Both are
functions of the faults, so a run without faults has to be told.
"""

import json
from pathlib import Path

from moe_runtime.checkpoint.folder import CHECKPOINTS_DIR, list_steps
from moe_runtime.checkpoint.manifest import MANIFEST_NAME, read_manifest
from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.jsonl import read_jsonl


def decisions_of(run_dir: Path) -> list[str]:
    """Overrides for `train`; empty if nothing was decided."""
    skipped = [line["step"] for line in read_jsonl(run_dir / METRICS_FILE) if line.get("skipped")]
    newest = list_steps(run_dir / CHECKPOINTS_DIR)
    ranges = read_manifest(newest[0] / MANIFEST_NAME).position.skipped if newest else ()
    overrides = [f"train.skip_updates={json.dumps(skipped)}"] if skipped else []
    return overrides + ([f"data.skip={json.dumps(ranges)}"] if ranges else [])
