"""Wire codecs: what a row of activations becomes while it travels.

A codec turns rows into a tuple of tensors that share their first axis, the fields of a record (see
`record.py`), and back. The dispatcher sees only the tuple: it gathers, sends and regroups all of it in
the same way, so a scale can never part from its codes.

    name        fields of a row of h elements         bytes      error of an element x
    auto        h x its own dtype                     as it is   none
    fp32        h x float32                           4 h        none, from FP64 2^-24 |x|
    bf16        h x bfloat16                          2 h        2^-8 |x|
    fp8         h x E4M3, h/128 x float32             1.031 h    2^-4 |x|, at least 2^-18.8 amax of the tile
    fp8_pow2    h x E4M3, h/128 x biased exponent     1.008 h    2^-4 |x|, at least 2^-17.8 amax of the tile

No float8 dtype leaves a codec: transports move bytes, and gloo and MPI know no such type.

`fp8_pow2` does not cast what has been cast: rows that carry their tiles (`carried.py`) are sent as those,
and with `keeps_tiles` they are left as tiles on arrival.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_comm.errors import CommError
from moe_comm.wire.carried import stand_in, tiles_of
from moe_comm.wire.tile import ScaleKind, dequantise_tiles, num_tiles, quantise_tiles

Fields = tuple[tuple[int, torch.dtype], ...]


class WireCodec(Protocol):
    """Rows to fields of records and back; stateless, the same on all ranks."""

    @property
    def name(self) -> str:
        """What `open_wire` calls it."""
        ...

    @property
    def keeps_tiles(self) -> bool:
        """Whether `decode` gives stand-ins that carry tiles (`carried.py`) instead of values."""
        ...

    def fields(self, hidden: int, dtype: torch.dtype) -> Fields:
        """(columns, dtype) of each field that `encode` gives for rows [n, hidden] of `dtype`."""
        ...

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The fields of rows [n, hidden], each [n, columns]; may share memory with them."""
        ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Rows [n, hidden] of `dtype`.

        Args:
            parts: the fields; may be strided views (columns adjacent), n may be 0.
            dtype: any floating dtype; usually that of the rows before `encode`.

        Returns:
            Rows; where nothing had to be computed, the first part itself.
        """
        ...


class AsIsCodec:
    """Rows travel in their own dtype: bit for bit the same, NaN payloads too, and never copied."""

    name = "auto"
    keeps_tiles = False

    def fields(self, hidden: int, dtype: torch.dtype) -> Fields:
        return ((hidden, dtype),)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


class FloatCodec:
    """Rows travel in one floating dtype, rounded to nearest even.

    Error of an element x: 2^-8 |x| for BF16 (1.01 times as much from FP64, which is rounded twice), 2^-24 |x|
    for FP32 from FP64; below the normals half the smallest subnormal, 2^-134 and 2^-150. What is beyond
    the largest finite value becomes infinite. A narrower dtype through a wider one is exact; a dtype
    through itself is exact and not copied.

    Args:
        name: what `open_wire` calls it.
        dtype: what travels.
    """

    keeps_tiles = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    def fields(self, hidden: int, dtype: torch.dtype) -> Fields:
        return ((hidden, self._dtype),)

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.to(self._dtype),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


class Fp8Codec:
    """Rows travel as E4M3 with one scale per tile of 128 columns.

    Error of an element x of a tile with scale s, decoded to FP32: at most max(2^-4 |x|, 2^-10 s), and with
    `fp32` another 2^-21 |x|, since scale and inverse are rounded. s is amax / 448 (fp32) or the smallest
    power of two not below it (pow2), amax at least 2^-100. Decoding to a narrower dtype rounds once more.
    A tile with anything that is not finite comes back as NaN. On a GPU the kernels of `tile_triton.py` do
    the same, bit for bit.

    Args:
        name: what `open_wire` calls it.
        scales: `fp32` or `pow2`.
        keeps_tiles: `decode` gives a stand-in that carries the tiles; with `pow2` only.

    Ref: DSV3 §3.3.2, §3.3.3
    """

    def __init__(self, name: str, scales: ScaleKind, keeps_tiles: bool = False) -> None:
        assert scales == "pow2" or not keeps_tiles, "tiles are kept with scales that are powers of two"
        self.name = name
        self._scales = scales
        self.keeps_tiles = keeps_tiles

    def fields(self, hidden: int, dtype: torch.dtype) -> Fields:
        scale_dtype = torch.float32 if self._scales == "fp32" else torch.uint8
        return ((hidden, torch.uint8), (num_tiles(hidden), scale_dtype))

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        carried = tiles_of(rows) if self._scales == "pow2" else None
        return quantise_tiles(rows, self._scales) if carried is None else carried

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        if self.keeps_tiles:
            return stand_in(codes.contiguous(), scales.contiguous(), dtype)
        return dequantise_tiles(codes, scales, dtype)


WIRES = ("auto", "bf16", "fp32", "fp8", "fp8_pow2")


def open_wire(name: str) -> WireCodec:
    """The codec of that name.

    Args:
        name: one of WIRES.

    Raises:
        CommError: no such wire.
    """
    if name == "auto":
        return AsIsCodec()
    if name in ("bf16", "fp32"):
        return FloatCodec(name, torch.bfloat16 if name == "bf16" else torch.float32)
    if name in ("fp8", "fp8_pow2"):
        return Fp8Codec(name, "fp32" if name == "fp8" else "pow2")
    raise CommError(f"wire: expected one of {', '.join(WIRES)}, got {name!r}")


def wire_pair(name: str, keep_tiles: bool = False) -> tuple[WireCodec, WireCodec]:
    """Codecs for (dispatch and the backward of combine, combine and the backward of dispatch).

    What is summed after it has travelled goes in BF16 where the other way goes in FP8: each addend
    would bring its own 2^-4.

    Args:
        name: one of WIRES.
        keep_tiles: the first of them leaves what arrives as tiles.

    Raises:
        CommError: no such wire, or keep_tiles with one other than fp8_pow2.

    Ref: DSV3 §3.3.3
    """
    dispatch = open_wire(name)
    if keep_tiles and name != "fp8_pow2":
        raise CommError(f"keep_tiles: expected wire fp8_pow2, got {name!r}; choose it, or keep no tiles")
    dispatch = Fp8Codec(name, "pow2", keeps_tiles=True) if keep_tiles else dispatch
    return dispatch, open_wire("bf16") if name in ("fp8", "fp8_pow2") else dispatch
