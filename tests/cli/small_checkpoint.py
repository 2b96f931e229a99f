"""A checkpoint of random weights, for commands that read one."""

from pathlib import Path

from moe_runtime.checkpoint.folder import TOKENIZER_FILE
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers
from tests.unit.checkpoint.models import CONFIG


def make_checkpoint(folder: Path, tokenizer: bool = True, **changes: object) -> Path:
    """A run of one checkpoint over bytes; `changes` are of its model."""
    model = CONFIG.model.model_dump() | {"vocab_size": 264, "mtp_depth": 1} | changes
    config = RunConfig.model_validate(CONFIG.model_dump() | {"model": model})
    weights = Transformer(config.model)
    weights.init_weights(0)
    extras = {TOKENIZER_FILE: ByteTokenizer().to_json().encode()} if tokenizer else {}
    meta = SaveMeta(tokens=0, config=config.model_dump(mode="json"), layout={"pp": 1, "dp": 1})
    contribution = Contribution(weights_to_save(weights.state_dict(), 0, Peers()), extras=extras)
    assert isinstance(CheckpointStore(folder / "run", Peers(), 1).save(1, contribution, meta), Saved)
    return folder / "run"
