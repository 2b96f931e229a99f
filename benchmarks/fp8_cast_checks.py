"""What the FP8 casts on a GPU have to give: plain torch forms on the same device, and comparisons with them.

Plain forms are eager torch in FP32, one operation after the other, rounding by `formats.encode_nearest`.
Casts must give their bits. Joined forms (SwiGLU, norm) may differ from torch in the last place before the
cast, so an element next to a tie may be one code apart: few of them, and within a step.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles


def plain_cast(tiled: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 values [.., length] with one amax each."""
    bits = (tiled.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1)
    is_poisoned = bits >= 0x7F800000
    exponent = ((bits.clamp(min=27 << 23) + 0x1FFFFF) >> 23) - 8
    inverse = ((254 - exponent) << 23).view(torch.float32)
    scaled = (tiled * inverse.unsqueeze(-1)).masked_fill(is_poisoned.unsqueeze(-1), torch.nan)
    codes = plain_round(scaled).masked_fill(is_poisoned.unsqueeze(-1), 0x7F)
    return codes, (exponent << 23).view(torch.float32).masked_fill(is_poisoned, torch.nan)


def plain_round(values: Tensor) -> Tensor:
    """E4M3 codes by `formats.encode_nearest`, integers on the bits."""
    from moe_comm.wire.formats import E4M3, encode_nearest

    return encode_nearest(values.contiguous(), E4M3)


def plain_rows(x: Tensor) -> Tiles:
    """Row tiles."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, num_tiles(columns) * TILE - columns))
    codes, scales = plain_cast(padded.view(rows, -1, TILE))
    return Tiles(codes.view(rows, -1)[:, :columns].contiguous(), scales)


def plain_columns(x: Tensor, groups: Groups) -> Tiles:
    """Column tiles: rows at their padded places, transposed, cast; gaps are zeros."""
    padded = x.new_zeros((groups.num_padded, x.shape[1]), dtype=torch.float32)
    places, start = [], 0
    for count, room in zip(groups.counts.tolist(), groups.padded_counts.tolist(), strict=True):
        places.append(torch.arange(start, start + count))
        start += room
    place = torch.cat(places).to(x.device)
    padded[place] = x.float()
    made = plain_rows(padded.t().contiguous())
    is_gap = torch.ones(groups.num_padded, dtype=torch.bool, device=x.device)
    is_gap[place] = False
    return Tiles(made.codes.masked_fill(is_gap, 0), made.scales)


def plain_decode(tiles: Tiles) -> Tensor:
    """float32 values by torch's cast of E4M3."""
    spread = tiles.scales.repeat_interleave(TILE, 1)[:, : tiles.shape[1]]
    return tiles.codes.view(torch.float8_e4m3fn).float() * spread


def plain_blocks(weight: Tensor) -> Blocks:
    """Blocks of a weight whose sides are multiples of 128."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // TILE, TILE, columns // TILE, TILE).transpose(1, 2)
    codes, scales = plain_cast(blocks.reshape(rows // TILE, columns // TILE, -1))
    shaped = codes.view(rows // TILE, columns // TILE, TILE, TILE).transpose(1, 2)
    return Blocks(shaped.reshape(rows, columns).contiguous(), scales)


def plain_gated(gate_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) x up x weight."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up * weights.unsqueeze(1)


def plain_gated_backward(d_product: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, gradient of the weights), in FP64 and rounded."""
    gate, up = gate_up.double().chunk(2, dim=1)
    pull, open_part = d_product.double(), torch.sigmoid(gate)
    d_weights = (pull * gate * open_part * up).sum(1)
    pull = pull * weights.double().unsqueeze(1)
    d_gate = pull * up * open_part * (1 + gate * (1 - open_part))
    return torch.cat([d_gate, pull * gate * open_part], dim=1).float(), d_weights.float()


def same(ours: Tiles | Blocks, plain: Tiles | Blocks) -> str:
    """What differs; empty if nothing does."""
    if ours.shape != plain.shape or ours.scales.shape != plain.scales.shape:
        return f"shape {list(ours.shape)} for {list(plain.shape)}"
    codes = int((ours.codes != plain.codes).sum())
    is_equal = (ours.scales == plain.scales) | (ours.scales.isnan() & plain.scales.isnan())
    scales = int((~is_equal).sum())
    return f"{codes} codes, {scales} scales" if codes or scales else ""


def near(ours: Tiles, plain: Tiles) -> str:
    """As `same`, but elements next to a tie may be a code apart: few, and within a step."""
    if ours.shape != plain.shape:
        return f"shape {list(ours.shape)} for {list(plain.shape)}"
    found, wanted = plain_decode(ours), plain_decode(plain)
    if not torch.equal(found.isnan(), wanted.isnan()):
        return "NaN elsewhere"
    found, wanted = found.nan_to_num(0.0, 0.0, 0.0), wanted.nan_to_num(0.0, 0.0, 0.0)
    quantum = plain.scales.nan_to_num(0.0).repeat_interleave(TILE, 1)[:, : wanted.shape[1]] * 2.0**-9
    far = int(((found - wanted).abs() > (wanted.abs() * 2.0**-3).maximum(quantum)).sum())
    share = float((ours.codes != plain.codes).float().mean())
    return f"{far} beyond a step, {share:.2e} of the codes differ" if far or share > 2e-3 else ""


def special(rows: int, columns: int, device: torch.device) -> Tensor:
    """A small ragged matrix with every special value."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(rows, columns, generator=generator).mul(4).exp() * torch.randn(
        rows, columns, generator=generator
    )
    values[0], values[1], values[2] = 0.0, -0.0, torch.finfo(torch.float32).max
    values[3, 5], values[4, 6], values[5, 7] = torch.inf, -torch.inf, torch.nan
    values[6] *= 2.0**-120
    values[7] = torch.finfo(torch.float32).tiny
    values[8, ::2] = 448.0
    return values.to(device)


def every_tie(device: torch.device) -> Tensor:
    """float32 [rows, 128] with amax 448: all E4M3 values, all midpoints, and their neighbours."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(448.0))])
    points = torch.cat([points, -points])
    tiled = torch.zeros(-(-points.numel() // 127), 128)
    tiled[:, 0] = 448.0
    flat = torch.nn.functional.pad(points, (0, tiled.shape[0] * 127 - points.numel()))
    tiled[:, 1:] = flat.view(-1, 127)
    return tiled.to(device)


@dataclass(frozen=True)
class Odd:
    """Small ragged inputs with every special value, and a part of the large ones.

    Args:
        part: [1024, hidden] in BF16; hidden a multiple of 128.
    """

    part: Tensor
    gain: Tensor
    values: Tensor
    groups: Groups
    gate_up: Tensor
    gate_up_tiles: Tiles
    weights: Tensor
    d_product: Tensor

    @classmethod
    def beside(cls, x: Tensor, gain: Tensor) -> "Odd":
        """Those of the device of x."""
        from moe_runtime.fp8 import cast_triton

        device = x.device
        gate_up = special(261, 512, device).clamp(-30, 30).bfloat16()
        return cls(
            part=x[:1024],
            gain=gain,
            values=special(261, 200, device),
            groups=Groups(torch.tensor([0, 5, 128, 0, 127, 1, 0]), device),
            gate_up=gate_up,
            gate_up_tiles=cast_triton.cast_rows_on_device(gate_up),
            weights=torch.rand(261, device=device),
            d_product=torch.randn(261, 256, device=device).bfloat16(),
        )


def check_backward(odd: Odd) -> str:
    """SwiGLU's gradient both ways, and that of the weights."""
    from moe_runtime.fp8 import cast_triton

    made, columns, d_weights = cast_triton.gated_backward_cast_on_device(
        odd.d_product, odd.gate_up_tiles, odd.weights, odd.groups
    )
    wanted, wanted_weights = plain_gated_backward(odd.d_product, plain_decode(odd.gate_up_tiles), odd.weights)
    fault = near(made, plain_rows(wanted)) or near(columns, plain_columns(wanted, odd.groups))
    assert d_weights is not None
    largest = wanted_weights.nan_to_num(0.0).abs().max()
    gap = float((d_weights - wanted_weights).nan_to_num(0.0).abs().max() / largest)
    return fault or (f"d_weights {gap:.1e}" if gap > 1e-5 else "")


def check_both(x: Tensor, groups: Groups) -> str:
    """Rows and columns from one read."""
    from moe_runtime.fp8 import cast_triton

    rows, columns = cast_triton.cast_both_on_device(x, groups)
    return same(rows, plain_rows(x)) or same(columns, plain_columns(x, groups))


def check_retile(x: Tensor, groups: Groups) -> str:
    """Columns from row tiles, where FP16 holds them and, past row 512, where shifts are too large for it."""
    from moe_runtime.fp8 import cast_triton as c

    steps = torch.arange(x.shape[0], device=x.device) % 13
    uneven = x.float() * torch.exp2(-torch.where(steps + 1 > 12, 40, steps).float()).unsqueeze(1)
    uneven[:512] = x[:512].float() * torch.exp2(-steps[:512].float()).unsqueeze(1)
    uneven[:, 3], uneven[:128, 5], uneven[130:256, 9] = 0.0, 2.0**-14, -0.0
    rows = c.cast_rows_on_device(uneven)
    plain = plain_columns(plain_decode(rows), groups)
    wide = c.columns_of_on_device(rows, groups, hardware_cast=False)
    return same(c.columns_of_on_device(rows, groups), plain) or same(wide, plain)


def check_normed(odd: Odd) -> str:
    """The output against FP64; the tiles are those of the output."""
    from moe_runtime.fp8 import cast_triton

    out, rstd, tiles = cast_triton.cast_normed_on_device(odd.part, odd.gain, 1e-6)
    wide = odd.part.double()
    factor = (wide.square().mean(1) + 1e-6).rsqrt()
    wanted = wide * factor.unsqueeze(1) * odd.gain.double()
    gap = float(((out.double() - wanted).abs() / wanted.abs().clamp(min=1e-3)).max())
    rstd_gap = float((rstd.double() / factor - 1).abs().max())
    if gap > 2.0**-8 * 1.01 or rstd_gap > 1e-5:
        return f"out {gap:.1e}, rstd {rstd_gap:.1e}"
    return same(tiles, plain_rows(out))


def check_weight_both(odd: Odd) -> str:
    """Blocks and the transposed, from one read."""
    from moe_runtime.fp8 import cast_triton

    blocks, mirrored = cast_triton.cast_weight_both_on_device(odd.part)
    plain = plain_blocks(odd.part)
    return same(blocks, plain) or same(mirrored, plain.transposed())


def check_decode(tiles: Tiles) -> str:
    """Values by torch's own cast."""
    from moe_runtime.fp8 import cast_triton

    ours, plain = cast_triton.decode_on_device(tiles), plain_decode(tiles)
    return "" if torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0)) else "values differ"


def checks(x: Tensor, gain: Tensor) -> dict[str, Callable[[], str]]:
    """What each kernel has to give, by name; each says what differs."""
    from moe_runtime.fp8 import cast_triton as c

    odd = Odd.beside(x, gain)
    o, ties = odd, every_tie(x.device)
    part_groups = Groups(torch.tensor([1000, 0, 24]), x.device)
    retiled = c.cast_rows_on_device(o.values)
    wanted, wanted_columns = plain_rows(o.values), plain_columns(o.values, o.groups)
    product = plain_gated(plain_decode(o.gate_up_tiles), o.weights)
    return {
        "hardware_cast": lambda: same(c.cast_rows_on_device(ties, hardware_cast=True), plain_rows(ties)),
        "rows_integer": lambda: same(c.cast_rows_on_device(o.values, hardware_cast=False), wanted),
        "rows": lambda: same(c.cast_rows_on_device(o.values), wanted),
        "rows_large": lambda: same(c.cast_rows_on_device(o.part), plain_rows(o.part)),
        "columns": lambda: same(c.cast_columns_on_device(o.values, o.groups), wanted_columns),
        "columns_large": lambda: same(
            c.cast_columns_on_device(o.part, part_groups), plain_columns(o.part, part_groups)
        ),
        "columns_integer": lambda: same(
            c.cast_columns_on_device(o.values, o.groups, hardware_cast=False), wanted_columns
        ),
        "both": lambda: check_both(o.values, o.groups) or check_both(o.part, part_groups),
        "columns_of": lambda: same(
            c.columns_of_on_device(retiled, o.groups), plain_columns(plain_decode(retiled), o.groups)
        ),
        "columns_of_large": lambda: check_retile(o.part, part_groups),
        "gated": lambda: near(
            c.cast_gated_on_device(o.gate_up, o.weights), plain_rows(plain_gated(o.gate_up, o.weights))
        ),
        "gated_tiles": lambda: near(
            c.cast_gated_tiles_on_device(o.gate_up_tiles, o.weights, o.groups),
            plain_columns(product, o.groups),
        ),
        "gated_backward": lambda: check_backward(odd),
        "normed": lambda: check_normed(odd),
        "weight": lambda: same(c.cast_weight_on_device(o.part), plain_blocks(o.part)),
        "weight_both": lambda: check_weight_both(odd),
        "decode": lambda: check_decode(retiled),
    }


def check_all(x: Tensor, gain: Tensor) -> dict[str, str]:
    """What is wrong, by the name of the check; empty if all is well.

    Args:
        x: [1024 or more rows, a multiple of 128 columns] in BF16.
        gain: [columns].
    """
    wrong = {}
    for name, check in checks(x, gain).items():
        try:
            fault = check()
        except Exception:
            fault = traceback.format_exc(limit=3)[-600:]
        if fault:
            wrong[name] = fault
    return wrong
