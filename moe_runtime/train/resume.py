"""Where a run takes up: at its newest good checkpoint, at the weights of another, or at the beginning."""

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.store import CheckpointStore
from moe_runtime.checkpoint.weights import check_same_model, load_weights
from moe_runtime.config.schema import YarnConfig
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.train.position import layout_facts
from moe_runtime.train.saving import TrainingState, load_state

# Keys of the model that a run may change when it begins with given weights: YaRN, as context extension does.
_FREE_KEYS = ("init_std", "yarn")


def begin_from(path: str, runtime: Runtime, first_expert: int, peers: Peers) -> str:
    """Fill this rank's part of the model with given weights, before there is an optimizer; says so.

    Any layout reads any checkpoint, also one without optimizer state, such as an imported one. Steps,
    schedules and moments begin anew.

    Args:
        path: checkpoint or run folder.
        first_expert: global number of this rank's first expert.

    Raises:
        CheckpointError: no good checkpoint is there, or one of another model; on every rank alike.
    """
    checkpoint = open_checkpoint(path, peers)

    def load() -> None:
        remedy = "use that model's section, or another train.init_from"
        check_same_model(checkpoint, runtime.config.model, _FREE_KEYS, remedy)
        for chunk in runtime.chunks.values():
            load_weights(chunk, checkpoint, first_expert)
        runtime.weight_casts.drop()

    peers.alike(load, (CheckpointError,))
    said = f"beginning with the weights of {checkpoint.path}"
    return said + other_original_length(checkpoint, runtime.config.model.yarn)


def other_original_length(checkpoint: Checkpoint, yarn: YarnConfig | None) -> str:
    """What to say where YaRN is put on weights of another length than it is told; empty if it fits.

    The default, 4,096, is right for DeepSeek-V3 alone, and a wrong length shows in the loss only.
    """
    config = checkpoint.manifest.config
    if yarn is None or config["model"].get("yarn") is not None:
        return ""
    trained = config["batch"]["seq_len"]
    if trained == yarn.original_seq_len:
        return ""
    return (
        f"\nwarning: model.yarn.original_seq_len: expected {trained}, the batch.seq_len of these weights, "
        f"got {yarn.original_seq_len}"
    )


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
    moved = other_layout(found.checkpoint, state)
    other = state.loader.differences(found.checkpoint.manifest.state.get("data", {})) if state.loader else []
    return start, [*said, f"resuming after step {start} from {found.checkpoint.path}{moved}", *other]


def other_layout(checkpoint: Checkpoint, state: TrainingState) -> str:
    """What to say where layout or form of moments are not those of the checkpoint; empty if they are."""
    manifest = checkpoint.manifest
    now = {**layout_facts(state.runtime.layout), "moments": state.runtime.config.optim.moments}
    was = {**manifest.layout, "moments": manifest.config.get("optim", {}).get("moments")}
    differing = [f"{key} {was.get(key)} -> {now[key]}" for key in now if was.get(key) != now[key]]
    return f", saved in another layout: {', '.join(differing)}" if differing else ""
