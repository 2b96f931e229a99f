"""What makes the latents of one model those of another, as one digest; and the form they have.

Latents may be used again only where the same text would give the same ones: same weights, same widths and
constants, same dtype, same kind of products. The fingerprint covers all of that, and the hash chain of
`prefix_blocks` begins with it. Versions of torch and numbers of threads change the last bit of a sum, as
the length of a batch does; they are left out.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.config.counts import cache_width
from moe_runtime.model.transformer import Transformer

LATENT_FORMAT = 1
"""Raised when a release computes or lays out latents in another way; older blocks are then never found."""


@dataclass(frozen=True)
class LatentForm:
    """Whose latents they are, and the shape of a token's.

    Args:
        fingerprint: of `fingerprint_of`.
        num_layers: MTP's included.
        width: of one token in one layer, as the cache holds it.
        dtype: of the model.
    """

    fingerprint: str
    num_layers: int
    width: int
    dtype: torch.dtype


def latent_form_of(model: Transformer, weight_files: Mapping[str, str] | None = None) -> LatentForm:
    """The form of a model's latents; `weight_files` as in `fingerprint_of`."""
    config = model.config
    return LatentForm(
        fingerprint_of(model, weight_files),
        config.num_layers + config.mtp_depth,
        cache_width(config),
        _dtype_of(model),
    )


def fingerprint_of(model: Transformer, weight_files: Mapping[str, str] | None = None) -> str:
    """64 hexadecimal digits that depend on every weight and on all else that latents depend on.

    Args:
        model: whole, or with a slice of the experts. A slice has other tensors than its neighbours, so
            processes that share a model's experts need `weight_files` to agree.
        weight_files: name -> SHA-256 of the files the weights were loaded from, as a checkpoint's manifest
            has them. None: the tensors are hashed, which takes seconds for every GB.
    """
    digest = hashlib.sha256(json.dumps(_identity(model), sort_keys=True).encode())
    if weight_files is not None:
        digest.update(json.dumps({"files": dict(weight_files)}, sort_keys=True).encode())
        return digest.hexdigest()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _identity(model: Transformer) -> dict[str, Any]:
    """All but the weights. Kinds of modules are in it because FP8 products replace some of them."""
    return {
        "latent_format": LATENT_FORMAT,
        "config": model.config.model_dump(mode="json"),
        "dtype": str(_dtype_of(model)),
        "device": next(model.parameters()).device.type,
        "document_separator": model.document_separator,
        "modules": {name: _kind(module) for name, module in model.named_modules()},
    }


def _kind(module: torch.nn.Module) -> list[str]:
    multiplier = getattr(module, "multiplier", None)
    return [type(module).__name__, type(multiplier).__name__]


def _dtype_of(model: Transformer) -> torch.dtype:
    return next(model.parameters()).dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
