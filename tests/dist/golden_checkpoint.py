"""Makes the golden checkpoints: one of every released format stays in the tests and must load.

    python -m tests.dist.golden_checkpoint tests/golden/checkpoints/format_N

writes the runs of `CASES` with the code at hand, and beside each what its state was, by digests of the
live optimizer. Those of an old format were made by the code that wrote it: they are never made again.
"""

import json
import shutil
import sys
from pathlib import Path

from tests.dist.layout_case import Case
from tests.dist.resume_case import Live, advance, digests, join, live, open_state, save
from tests.ranks import run_ranks

MODEL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 2,
    "ffn_size": 24,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "num_experts": 4,
    "num_groups": 2,
    "num_groups_kept": 1,
    "expert_ffn_size": 8,
}
LAYOUT = {"pp": 2, "dp": 2, "ep": 2}
CASES = {
    # One-way: first and last stage hold a copy of the embedding each.
    "fp8": Case(
        "fp8", LAYOUT | {"schedule": "1f1b"}, 4, mtp_depth=1, precision="bf16", model=MODEL, moments="fp8"
    ),
    # Mirrored rows; the average of the weights too.
    "bf16": Case(
        "bf16",
        LAYOUT | {"schedule": "dualpipe"},
        4,
        mtp_depth=1,
        precision="fp32",
        model=MODEL,
        moments="bf16",
    ),
}
STEPS = 3


def _make(rank: int, world_size: int, case: Case, folder: str) -> Live:
    state = open_state(case, rank, ema_decay=0.5 if case.name == "bf16" else None)
    advance(state, 0, STEPS)
    save(state, folder, STEPS)
    return live(state)


def main(folder: Path) -> None:
    """Make all golden checkpoints below `folder`."""
    for name, case in CASES.items():
        run = folder / name
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        said = digests(join(run_ranks(_make, 4, case, str(run))))
        (run / "state.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
