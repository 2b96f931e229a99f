"""Bandwidth of the FP8 casts on a GPU, against a copy timed in the same run.

    PYTHONPATH=.:comm python benchmarks/fp8_casts.py [--sweep] [--rows 8192] [--hidden 7168] [--gated-rows 16384]

Prints one JSON object, then a table. Each cast first has to give the bits of plain torch forms on the same
device (joined forms: of a cast of values made by torch, but for elements next to a tie); then all of them and
a copy are timed in turn, `--repeats` rounds, and the median counts. A cast's bandwidth is the bytes it cannot
avoid (each input read once, each output written once, scales too) over its time; `fraction` is that over the
copy's. A kernel that fails is reported and the others go on. `--sweep` times other sizes of programs too.

Exit codes: 0; 1 where bits differ or a kernel failed; 2 without a CUDA device.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles

COPY_BYTES = 1 << 30
WARM_UP_ROUNDS = 3
COVER_BYTES = 512 << 20


@dataclass(frozen=True)
class Task:
    """Something to time: `run` does it once and has to move `moved_bytes` at least."""

    run: Callable[[], object]
    moved_bytes: int


@dataclass(frozen=True)
class Inputs:
    """Tensors of one run; `groups` share out the rows of x, `gated_groups` those of gate_up."""

    x: Tensor
    tiles: Tiles
    groups: Groups
    gate_up: Tensor
    gate_up_tiles: Tiles
    gated_groups: Groups
    d_product: Tensor
    row_weights: Tensor
    gain: Tensor


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--gated-rows", type=int, default=16384)
    parser.add_argument("--gated-width", type=int, default=4096, help="2f")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    return parser.parse_args(arguments)


def ragged_groups(rows: int, groups: int, generator: torch.Generator, device: torch.device) -> Groups:
    """Random counts that sum to `rows`, the first group without any."""
    owners = torch.randint(min(1, groups - 1), groups, (rows,), generator=generator)
    return Groups(torch.bincount(owners, minlength=groups), device)


def make_inputs(options: argparse.Namespace, device: torch.device) -> Inputs:
    """Random values; some tiles hold zeros, infinities, NaN and huge numbers in the checks alone."""
    from moe_runtime.fp8 import cast_triton

    generator = torch.Generator(device).manual_seed(options.seed)
    host = torch.Generator().manual_seed(options.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x = random(options.rows, options.hidden)
    gate_up = random(options.gated_rows, options.gated_width)
    return Inputs(
        x=x,
        tiles=cast_triton.cast_rows_on_device(x),
        groups=ragged_groups(options.rows, options.groups, host, device),
        gate_up=gate_up,
        gate_up_tiles=cast_triton.cast_rows_on_device(gate_up),
        gated_groups=ragged_groups(options.gated_rows, options.groups, host, device),
        d_product=random(options.gated_rows, options.gated_width // 2),
        row_weights=torch.rand(options.gated_rows, generator=generator, device=device),
        gain=random(options.hidden).float(),
    )


# Plain forms: eager torch on the same device, FP32, one operation after the other.


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


def checks(inputs: Inputs) -> dict[str, Callable[[], str]]:
    """What each kernel has to give, by name; each says what differs."""
    from moe_runtime.fp8 import cast_triton as c

    device = inputs.x.device
    odd = special(261, 200, device)
    odd_groups = Groups(torch.tensor([0, 5, 128, 0, 127, 1, 0]), device)
    odd_gated = special(261, 512, device).clamp(-30, 30).bfloat16()
    odd_tiles = c.cast_rows_on_device(odd_gated)
    odd_weights = torch.rand(261, device=device)
    d_odd = torch.randn(261, 256, device=device).bfloat16()
    ties = every_tie(device)
    part = inputs.x[:1024]
    part_groups = Groups(torch.tensor([1000, 0, 24]), device)
    integer: dict[str, Any] = {"hardware_cast": False}

    def backward() -> str:
        made, columns, d_weights = c.gated_backward_cast_on_device(d_odd, odd_tiles, odd_weights, odd_groups)
        wanted, wanted_weights = plain_gated_backward(d_odd, plain_decode(odd_tiles), odd_weights)
        faults = [near(made, plain_rows(wanted)), near(columns, plain_columns(wanted, odd_groups))]
        assert d_weights is not None
        gap = (d_weights - wanted_weights).nan_to_num(0.0).abs().max() / wanted_weights.nan_to_num(
            0.0
        ).abs().max()
        return "; ".join(fault for fault in (*faults, f"d_weights {gap:.1e}" if gap > 1e-5 else "") if fault)

    def both(x: Tensor, groups: Groups) -> str:
        rows, columns = c.cast_both_on_device(x, groups)
        return same(rows, plain_rows(x)) or same(columns, plain_columns(x, groups))

    def normed() -> str:
        out, rstd, tiles = c.cast_normed_on_device(part, inputs.gain, 1e-6)
        wide = part.double()
        factor = (wide.square().mean(1) + 1e-6).rsqrt()
        wanted = wide * factor.unsqueeze(1) * inputs.gain.double()
        gap = float(((out.double() - wanted).abs() / wanted.abs().clamp(min=1e-3)).max())
        rstd_gap = float((rstd.double() / factor - 1).abs().max())
        fault = f"out {gap:.1e}, rstd {rstd_gap:.1e}" if gap > 2.0**-8 or rstd_gap > 1e-5 else ""
        return fault or same(tiles, plain_rows(out))

    def weight_both() -> str:
        blocks, mirrored = c.cast_weight_both_on_device(part)
        plain = plain_blocks(part)
        return same(blocks, plain) or same(mirrored, plain.transposed())

    retiled = c.cast_rows_on_device(odd)
    return {
        "hardware_cast": lambda: same(c.cast_rows_on_device(ties, hardware_cast=True), plain_rows(ties)),
        "rows_integer": lambda: same(c.cast_rows_on_device(odd, **integer), plain_rows(odd)),
        "rows": lambda: (
            same(c.cast_rows_on_device(odd), plain_rows(odd)) or same(inputs.tiles, plain_rows(inputs.x))
        ),
        "columns": lambda: (
            same(c.cast_columns_on_device(odd, odd_groups), plain_columns(odd, odd_groups))
            or same(c.cast_columns_on_device(part, part_groups), plain_columns(part, part_groups))
        ),
        "columns_integer": lambda: same(
            c.cast_columns_on_device(odd, odd_groups, **integer), plain_columns(odd, odd_groups)
        ),
        "both": lambda: both(odd, odd_groups) or both(part, part_groups),
        "columns_of": lambda: same(
            c.columns_of_on_device(retiled, odd_groups), plain_columns(plain_decode(retiled), odd_groups)
        ),
        "gated": lambda: near(
            c.cast_gated_on_device(odd_gated, odd_weights), plain_rows(plain_gated(odd_gated, odd_weights))
        ),
        "gated_tiles": lambda: near(
            c.cast_gated_tiles_on_device(odd_tiles, odd_weights, odd_groups),
            plain_columns(plain_gated(plain_decode(odd_tiles), odd_weights), odd_groups),
        ),
        "gated_backward": backward,
        "normed": normed,
        "weight": lambda: same(c.cast_weight_on_device(part), plain_blocks(part)),
        "weight_both": weight_both,
        "decode": lambda: (
            ""
            if torch.equal(c.decode_on_device(retiled).nan_to_num(7.0), plain_decode(retiled).nan_to_num(7.0))
            else "values"
        ),
    }


def make_tasks(inputs: Inputs, sweep: bool) -> dict[str, Task]:
    """What is timed, by name; with `sweep` in other shapes too."""
    from moe_runtime.fp8 import cast_triton as c

    i = inputs
    x_bytes, code_bytes = i.x.nbytes, i.tiles.nbytes
    padded = code_bytes * i.groups.num_padded // i.x.shape[0]
    wide_bytes, wide_codes = i.gate_up.nbytes, i.gate_up_tiles.nbytes
    wide_padded = wide_codes * i.gated_groups.num_padded // i.gate_up.shape[0]
    gated = (i.gate_up_tiles, i.row_weights, i.gated_groups)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=i.x.device)
    target = torch.empty_like(source)
    tasks = {"copy": Task(lambda: target.copy_(source), 2 * COPY_BYTES)}
    plans: dict[str, tuple[Callable[..., object], int, list[dict[str, Any]]]] = {
        "rows": (
            lambda **o: c.cast_rows_on_device(i.x, **o),
            x_bytes + code_bytes,
            [{"hardware_cast": False}, *grid("rows", (16, 4), (64, 4), (64, 8))],
        ),
        "columns": (
            lambda **o: c.cast_columns_on_device(i.x, i.groups, **o),
            x_bytes + padded,
            [{"hardware_cast": False}, *grid("columns", (32, 4), (64, 8), (128, 8))],
        ),
        "both": (
            lambda **o: c.cast_both_on_device(i.x, i.groups, **o),
            x_bytes + code_bytes + padded,
            [{"num_warps": 4}, {"num_warps": 16}],
        ),
        "columns_of": (
            lambda **o: c.columns_of_on_device(i.tiles, i.groups, **o),
            code_bytes + padded,
            grid("columns", (64, 4), (64, 8), (128, 16)),
        ),
        "gated": (
            lambda **o: c.cast_gated_on_device(i.gate_up, i.row_weights, **o),
            wide_bytes + wide_codes // 2,
            grid("rows", (16, 4), (64, 8)),
        ),
        "gated_tiles": (
            lambda **o: c.cast_gated_tiles_on_device(*gated, **o),
            wide_codes + wide_padded // 2,
            grid("columns", (64, 4), (64, 8), (128, 16)),
        ),
        "gated_backward": (
            lambda **o: c.gated_backward_cast_on_device(i.d_product, *gated, **o),
            i.d_product.nbytes + 2 * wide_codes + wide_padded,
            [{"num_warps": 16}, {"max_registers": 128}, {"num_warps": 16, "max_registers": 64}],
        ),
        "normed": (
            lambda **o: c.cast_normed_on_device(i.x, i.gain, 1e-6, **o),
            2 * x_bytes + code_bytes,
            [{"num_warps": 4}, {"num_warps": 16}],
        ),
        "weight": (
            lambda **o: c.cast_weight_on_device(i.x, **o),
            x_bytes + i.x.numel(),
            [{"num_warps": 4}, {"num_warps": 16}],
        ),
        "weight_both": (
            lambda **o: c.cast_weight_both_on_device(i.x, **o),
            x_bytes + 2 * i.x.numel(),
            [{"num_warps": 4}, {"num_warps": 16}],
        ),
        "decode": (lambda **o: c.decode_on_device(i.tiles, torch.bfloat16, **o), x_bytes + code_bytes, []),
    }
    for name, (run, moved, others) in plans.items():
        for chosen in ({}, *(others if sweep else [])):
            title = name + "".join(f" {key}={value}" for key, value in chosen.items())
            tasks[title] = Task(lambda run=run, chosen=chosen: run(**chosen), moved)
    return tasks


def grid(name: str, *pairs: tuple[int, int]) -> list[dict[str, Any]]:
    """Options for pairs of a size and a number of warps."""
    return [{name: size, "num_warps": warps} for size, warps in pairs]


def time_in_turn(tasks: dict[str, Task], repeats: int, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each task, the tasks taking turns; what fails is noted and left out.

    The device is busy with a copy while a task is launched, so that its time is free of the host's, and
    what the task reads is no longer in L2.
    """
    cover = torch.empty(2, COVER_BYTES, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(WARM_UP_ROUNDS + repeats):
        for name, task in tasks.items():
            if name in failed:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            try:
                cover[0].copy_(cover[1])
                begin.record()
                task.run()
                end.record()
                end.synchronize()
            except Exception as error:
                failed[name] = repr(error)[:300]
                continue
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items() if times}


def check_all(inputs: Inputs) -> dict[str, str]:
    """What is wrong, by the name of the check; empty if all is well."""
    wrong = {}
    for name, check in checks(inputs).items():
        try:
            fault = check()
        except Exception:
            fault = traceback.format_exc(limit=3)[-600:]
        if fault:
            wrong[name] = fault
    return wrong


def report(tasks: dict[str, Task], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Bytes, time, rate and fraction of each."""
    rates = {name: tasks[name].moved_bytes / time for name, time in seconds.items()}
    return {
        name: {
            "bytes": tasks[name].moved_bytes,
            "time_us": round(time * 1e6, 1),
            "gb_per_s": round(rates[name] / 1e9, 1),
            "fraction": round(rates[name] / rates["copy"], 3),
        }
        for name, time in seconds.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("fp8_casts: expected a CUDA device, found none; run it where there is a GPU", file=sys.stderr)
        return 2
    inputs = make_inputs(options, torch.device("cuda"))
    wrong = check_all(inputs)
    failed: dict[str, str] = {}
    tasks = make_tasks(inputs, options.sweep)
    seconds = time_in_turn(tasks, options.repeats, failed)
    results = report(tasks, seconds)
    shape = {key: value for key, value in vars(options).items() if key not in ("sweep", "repeats")}
    made = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": shape}
    print(json.dumps({**made, "wrong": wrong, "failed": failed, "results": results}))
    for name, row in results.items():
        print(f"{name:44s} {row['time_us']:9.1f} us {row['gb_per_s']:8.1f} GB/s {row['fraction']:6.3f}")
    for name, fault in (wrong | failed).items():
        print(f"WRONG {name}: {fault}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
