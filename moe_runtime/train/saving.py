"""What a run saves and how it comes back: weights, biases, this rank's optimizer partitions.

Everything else of the state is arithmetic on the step number (data order, schedules, noise of the FP8
moments), so a resumed run takes the same bits onward.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from moe_runtime.checkpoint.folder import TOKENIZER_FILE, Checkpoint
from moe_runtime.checkpoint.optimizer import capture_partition
from moe_runtime.checkpoint.reshard import plan_cuts, restore_cut
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.store import Contribution, SaveMeta
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.checkpoint.weights import (
    check_same_model,
    load_weights,
    split_experts,
    weights_to_save,
)
from moe_runtime.config.derive import sequences_before
from moe_runtime.data.loader import Loader
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import CheckpointError
from moe_runtime.optim.ema import HostEma
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.train.guard.state import GuardState
from moe_runtime.train.position import layout_facts, rng_facts, schedules_at


@dataclass(frozen=True)
class TrainingState:
    """The parts of a rank that a checkpoint holds.

    Args:
        ema: over what this rank writes, if it is kept.
        loader: of training; knows which data comes when. None where nothing is read.
    """

    runtime: Runtime
    optimizer: ZeroOptimizer
    peers: Peers
    tokenizer: Tokenizer
    guard: GuardState
    ema: HostEma | None = None
    loader: Loader | None = None

    @cached_property
    def extras(self) -> dict[str, bytes]:
        """Files that every checkpoint carries, by the one rank that writes them."""
        return {TOKENIZER_FILE: self.tokenizer.to_json().encode()} if self.peers.is_first else {}

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


def capture(state: TrainingState, owned: Collection[str]) -> Contribution:
    """What this rank writes, live: the next step changes it.

    Args:
        owned: canonical names of the weights that this rank writes, from `weights_to_save`.
    """
    client = state.optimizer.client
    partitions = [
        capture_partition(part, client.native_state(part.master), state.first_expert)  # type: ignore[attr-defined]
        for part in state.optimizer.partitions()
    ]
    held = split_experts(state.weights(), state.first_expert)
    weights = {name: tensor for name, tensor in held.items() if name in owned}
    ema = state.ema.tensors() if state.ema else {}
    return Contribution(weights, partitions, state.extras, ema)


def describe(state: TrainingState, step: int, tokens: int) -> SaveMeta:
    """What a checkpoint after `step` steps says about the run; alike on every rank."""
    config, layout = state.runtime.config, state.runtime.layout
    data = {} if state.loader is None else {"data": state.loader.to_json()}
    separator = {"document_separator": state.tokenizer.eos_id} if config.data.document_mask else {}
    return SaveMeta(
        tokens=tokens,
        config=config.model_dump(mode="json"),
        layout=layout_facts(layout),
        state={"tokenizer": state.tokenizer.name, "guard": state.guard.to_json()} | data | separator,
        sequences=sequences_before(config, layout, step),
        skipped=state.guard.skipped_data.ranges,
        schedules=schedules_at(config, step, tokens),
        rng=rng_facts(config),
    )


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
    manifest, position = checkpoint.manifest, checkpoint.manifest.position
    state.runtime.layout = replace(state.runtime.layout, taken_over=(position.step, position.tokens))
    state.guard.restore(manifest.state.get("guard", {}), position.skipped, position.sequences)
    if state.loader is not None:
        reached = position.tokens // state.runtime.config.batch.seq_len
        state.loader.restore(manifest.state.get("data", {}), state.guard.skipped_data.number(reached))
    return position.step


def _load_ema(ema: HostEma | None, checkpoint: Checkpoint) -> None:
    """The saved average; one that was not kept so far begins at the weights just loaded."""
    if ema is None:
        return
    if any(True for _ in checkpoint.manifest.weights("ema")):
        ema.restore(dict(read_tensors(checkpoint, ema.tensors(), "ema")))
    else:
        ema.begin_anew()
