"""The bytes of one block on disk: a safetensors file that proves its own wholeness.

    header      JSON, the same bytes in every file of a model
    latents     [layers, 64, width]
    tokens      int64 [64]     of the block
    parent      uint8 [32]     key of the block before
    seal        uint8 [32]     SHA-256 of all bytes above

A reader knows every byte it expects but the latents and the seal. So it compares and never parses: a file
of another model, shape, dtype or text differs, and one in which a bit has turned breaks the seal. The
header is written here and not by the safetensors library, whose spelling may change from one version to
the next; the library reads the file all the same.
"""

import hashlib
import json
import math

import torch
from torch import Tensor

from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS, Block
from moe_runtime.generate.prefix_fingerprint import LatentForm

_WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SEAL_BYTES = 32
_ALIGNMENT = 64  # the latents begin at a multiple of it


class BlockFile:
    """Packs and unpacks the blocks of one model.

    Args:
        form: shape and dtype of latents.
    """

    def __init__(self, form: LatentForm) -> None:
        self._shape = (form.num_layers, BLOCK_TOKENS, form.width)
        self._dtype = form.dtype
        latent_bytes = math.prod(self._shape) * form.dtype.itemsize
        self._header = _header(form, latent_bytes)
        self._tokens_at = len(self._header) + latent_bytes
        self._parent_at = self._tokens_at + 8 * BLOCK_TOKENS
        self._seal_at = self._parent_at + _SEAL_BYTES
        self.num_bytes = self._seal_at + _SEAL_BYTES

    def pack(self, block: Block, latents: Tensor) -> bytearray:
        """The file of a block with latents [layers, 64, width]."""
        data = bytearray(self.num_bytes)
        data[: len(self._header)] = self._header
        self._latents_in(data).copy_(latents)
        data[self._tokens_at : self._parent_at] = block.tokens
        data[self._parent_at : self._seal_at] = block.parent
        data[self._seal_at :] = self._seal_of(data)
        return data

    def unpack(self, block: Block, data: bytearray) -> Tensor | None:
        """The latents [layers, 64, width], which share memory with `data`; None if anything is not right."""
        if (
            len(data) != self.num_bytes
            or not data.startswith(self._header)
            or data[self._tokens_at : self._parent_at] != block.tokens
            or data[self._parent_at : self._seal_at] != block.parent
            or data[self._seal_at :] != self._seal_of(data)
        ):
            return None
        return self._latents_in(data)

    def _latents_in(self, data: bytearray) -> Tensor:
        count = math.prod(self._shape)
        flat = torch.frombuffer(data, dtype=self._dtype, count=count, offset=len(self._header))
        return flat.view(self._shape)

    def _seal_of(self, data: bytearray) -> bytes:
        return hashlib.sha256(memoryview(data)[: self._seal_at]).digest()


def _header(form: LatentForm, latent_bytes: int) -> bytes:
    """Length, JSON and blanks, as safetensors has them."""
    tensors = {
        "latents": (_WORDS[form.dtype], [form.num_layers, BLOCK_TOKENS, form.width], latent_bytes),
        "tokens": ("I64", [BLOCK_TOKENS], 8 * BLOCK_TOKENS),
        "parent": ("U8", [_SEAL_BYTES], _SEAL_BYTES),
        "seal": ("U8", [_SEAL_BYTES], _SEAL_BYTES),
    }
    fields: dict[str, object] = {
        "__metadata__": {"format": "moe_runtime prefix block 1", "model": form.fingerprint}
    }
    start = 0
    for name, (word, shape, num_bytes) in tensors.items():
        fields[name] = {"dtype": word, "shape": shape, "data_offsets": [start, start + num_bytes]}
        start += num_bytes
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
