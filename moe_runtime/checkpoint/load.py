"""A trained model out of a checkpoint, whole and on one device, whatever layout trained it."""

from pathlib import Path

import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.placement import Placement
from pydantic import ValidationError

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.weights import load_weights
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import CheckpointError
from moe_runtime.model.transformer import Transformer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp8": torch.bfloat16}


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ema: bool = False,
) -> Transformer:
    """Load a model: `model(tokens) -> logits` for int64 tokens [batch, seq].

    Args:
        path: a run folder, of which the last good checkpoint is taken, or a checkpoint folder.
        device: where its parameters go.
        dtype: of its parameters; None: as it was trained, BF16 where products were FP8.
        ema: take the average of the weights over steps instead of the last ones.

    Raises:
        CheckpointError: there is no good checkpoint, or its model cannot be built.
    """
    return model_from(open_checkpoint(path), device, dtype, ema)


def model_from(
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ema: bool = False,
    dispatcher: Dispatcher | None = None,
) -> Transformer:
    """The same, from a checkpoint that is open.

    Args:
        dispatcher: over the ranks that share the experts, of which only this rank's are loaded; None: all.
    """
    config = config_of(checkpoint)
    placement = Placement(config.model.num_experts) if dispatcher is None else dispatcher.placement
    first_expert = placement.ep_rank * placement.local_experts
    model = Transformer(
        config.model,
        num_local_experts=placement.local_experts,
        first_expert=first_expert,
        dtype=_DTYPES[config.precision] if dtype is None else dtype,
        device=device,
        document_separator=checkpoint.manifest.state.get("document_separator"),
        dispatcher=dispatcher,
    )
    load_weights(model, checkpoint, first_expert, "ema" if ema else "weights")
    return model.eval()


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The configuration of the run that saved a checkpoint.

    Raises:
        CheckpointError: this version does not understand it.
    """
    try:
        return RunConfig.model_validate(checkpoint.manifest.config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{checkpoint.path}: config: {place}: {first['msg']}") from None
