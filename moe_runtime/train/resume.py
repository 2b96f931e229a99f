"""Where a run takes up: at its newest good checkpoint, or at the beginning."""

from moe_runtime.checkpoint.store import CheckpointStore
from moe_runtime.errors import CheckpointError
from moe_runtime.train.saving import TrainingState, load_state


def resume(store: CheckpointStore, state: TrainingState, fresh: bool) -> tuple[int, list[str]]:
    """Load the newest good checkpoint; gives the steps done and what to tell.

    Args:
        fresh: forget what is there and start over.

    Raises:
        CheckpointError: there are checkpoints, and none of them is good.
    """
    if fresh:
        store.clear()
        return 0, []
    found = store.latest_good()
    if found.checkpoint is None and found.skipped:
        reasons = "; ".join(map(str, found.skipped))
        raise CheckpointError(f"no good checkpoint is left: {reasons}; --fresh starts over")
    said = [f"passed over a damaged checkpoint: {damaged}" for damaged in found.skipped]
    if found.checkpoint is None:
        return 0, said
    start = load_state(state, found.checkpoint)
    return start, [*said, f"resuming after step {start} from {found.checkpoint.path}"]
