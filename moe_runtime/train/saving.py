"""What a run saves and how it comes back: weights, biases, this rank's optimizer partitions.

Everything else of the state is arithmetic on the step number (data order, schedules, noise of the FP8
moments), so a resumed run takes the same bits onward.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, Checkpoint
from moe_runtime.checkpoint.optimizer import capture_partition
from moe_runtime.checkpoint.reshard import plan_cuts, restore_cut
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveFailed, SaveMeta
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.checkpoint.weights import check_same_model, load_weights, weights_to_save
from moe_runtime.config.derive import sequences_before
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.ema import HostEma
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.train.position import rng_facts, schedules_at


@dataclass(frozen=True)
class TrainingState:
    """The parts of a rank that a checkpoint holds; `ema` is over what this rank writes, if it is kept."""

    runtime: Runtime
    optimizer: ZeroOptimizer
    peers: Peers
    tokenizer: Tokenizer
    ema: HostEma | None = None

    @property
    def first_expert(self) -> int:
        mesh = self.runtime.mesh
        return mesh.ep_rank * (self.runtime.config.model.num_experts // mesh.ep)

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and saved buffer of this rank, live."""
        chunks = self.runtime.chunks.values()
        return {name: tensor for chunk in chunks for name, tensor in chunk.state_dict().items()}


def with_ema(state: TrainingState, decay: float | None) -> TrainingState:
    """The same with an average of what this rank writes, unless `decay` is None; a collective call."""
    if decay is None:
        return state
    owned = weights_to_save(state.weights(), state.first_expert, state.peers)
    return replace(state, ema=HostEma(owned, decay))


def save_state(store: CheckpointStore, state: TrainingState, step: int, tokens: int) -> Saved | SaveFailed:
    """Write a checkpoint after `step` steps; a collective call, alike on every rank."""
    client = state.optimizer.client
    partitions = [
        capture_partition(part, client.native_state(part.master), state.first_expert)  # type: ignore[attr-defined]
        for part in state.optimizer.partitions()
    ]
    weights = weights_to_save(state.weights(), state.first_expert, state.peers)
    extras = {TOKENIZER_FILE: state.tokenizer.to_json().encode()} if state.peers.is_first else {}
    config, layout = state.runtime.config, state.runtime.layout
    separator = {"document_separator": state.tokenizer.eos_id} if config.data.document_mask else {}
    meta = SaveMeta(
        tokens=tokens,
        config=config.model_dump(mode="json"),
        layout={
            "pp": layout.pp,
            "dp": layout.dp,
            "ep": layout.ep,
            "world_size": layout.world_size,
            "schedule": layout.schedule,
        },
        state={"tokenizer": state.tokenizer.name} | separator,
        sequences=sequences_before(config, layout, step),
        schedules=schedules_at(config, step, tokens),
        rng=rng_facts(config),
    )
    ema = state.ema.tensors() if state.ema else {}
    return store.save(step, Contribution(weights, partitions, extras, ema), meta)


def load_state(state: TrainingState, checkpoint: Checkpoint) -> int:
    """Take everything from a verified checkpoint of any layout; gives the number of steps done.

    Raises:
        CheckpointError: another model, or optimizer state that is not whole; on every rank alike.
    """

    def load() -> None:
        config = state.runtime.config
        check_same_model(checkpoint, config.model)
        partitions = state.optimizer.partitions()
        cuts = plan_cuts(checkpoint, partitions, config.optim.moments, state.first_expert)
        load_weights(state.weights(), checkpoint, state.first_expert)
        with SliceReader(checkpoint) as reader:
            for cut in cuts:
                restore_cut(reader, cut, state.optimizer.client)  # type: ignore[arg-type]
        state.runtime.weight_casts.drop()
        _load_ema(state.ema, checkpoint)

    state.peers.alike(load, (CheckpointError,))
    position = checkpoint.manifest.position
    state.runtime.layout = replace(state.runtime.layout, taken_over=(position.step, position.tokens))
    return position.step


def _load_ema(ema: HostEma | None, checkpoint: Checkpoint) -> None:
    """The saved average; one that was not kept so far begins at the weights just loaded."""
    if ema is None:
        return
    if any(True for _ in checkpoint.manifest.weights("ema")):
        ema.restore(dict(read_tensors(checkpoint, ema.tensors(), "ema")))
    else:
        ema.begin_anew()
