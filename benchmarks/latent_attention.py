"""Attention over the latent cache of one layer: the kernel against bounds and torch's forms.

    python benchmarks/latent_attention.py [--batch 1] [--context 4096] [--heads 128] [--new 1] [--sweep]

DeepSeek-V3's widths in BF16. Prints a JSON object a line: the ceilings of this device, then each shape. A
shape is first compared with torch's form in FP32. Contenders take turns: ours; `gather`, that form, on the
BF16 cache; torch's SDPA on keys and values that are lifted already, where these fit (lifting them is left
out). `bound_us` is the larger of two times: bytes that cannot be avoided (latents, queries, what is gathered)
at the speed of a copy, and operations at that of a product 8192^3. Several caches are read in turn, so that
none waits in L2.

Exit codes: 0; 1 where a result is off; 2 without a CUDA device.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_runtime.cli.bench_slice.peaks import measure_peaks
from moe_runtime.model.latent_attention import gather

RANK, ROPE, NOPE, V = 512, 64, 128, 128
SCALE = (NOPE + ROPE) ** -0.5
COLD_BYTES = 1 << 28  # of all caches together: several times L2
LIFTED_BYTES = 24 << 30  # beyond this SDPA on lifted keys is left out
FP32_BYTES = 16 << 30  # beyond this `gather` is
TOLERANCE = 2.0**-7  # of the largest latent: softmax weights are rounded to BF16, as is the result
SWEEP = ((64, 8, 2), (32, 8, 3), (32, 8, 4))
SWEEP_OF_FEW = ((32, 4, 2), (32, 4, 3), (64, 8, 2), (16, 4, 4))


class Shape:
    """One shape and its operands.

    Args:
        batch: texts; context: slots of each; new: queries of each, the last of which sees all slots.
    """

    def __init__(self, batch: int, context: int, heads: int, new: int, device: torch.device) -> None:
        self.batch, self.context, self.heads, self.new = batch, context, heads, new
        generator = torch.Generator(device).manual_seed(batch + context)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.q_latent = draw(heads, batch * new, RANK).transpose(0, 1)
        self.q_rope = draw(batch * new, heads, ROPE)
        bytes_of_one = batch * context * (RANK + ROPE) * 2
        copies = max(1, -(-COLD_BYTES // bytes_of_one)) if device.type == "cuda" else 1
        self.caches = [draw(batch, context, RANK + ROPE) for _ in range(copies)]
        self.slots = torch.arange(context - new, context, device=device).expand(batch, new).contiguous()

    @property
    def moved_bytes(self) -> int:
        """Latents and queries read, results written."""
        queries = self.batch * self.new * self.heads
        return 2 * (self.batch * self.context * (RANK + ROPE) + queries * (2 * RANK + ROPE))

    @property
    def operations(self) -> float:
        """Of scores and of what is gathered."""
        return 2.0 * self.batch * self.new * self.heads * self.context * (2 * RANK + ROPE)

    def ours(self, number: int, slots: Tensor | None = None, **options: Any) -> Tensor:
        """The kernel on one of the caches."""
        from moe_runtime.model.latent_attention_triton import attend

        seen, cache = self.slots if slots is None else slots, self.caches[number % len(self.caches)]
        return attend(self.q_latent, self.q_rope, cache, seen, SCALE, 0, self.context, **options)

    def gather(self, number: int, slots: Tensor | None = None) -> Tensor:
        """torch's form; all queries see all slots unless `slots` says otherwise."""
        queries = (part.unflatten(0, (self.batch, self.new)) for part in (self.q_latent, self.q_rope))
        barrier = None
        if slots is not None:
            hidden = torch.arange(self.context, device=slots.device) > slots.unsqueeze(2)
            barrier = (
                torch.zeros(hidden.shape, device=slots.device).masked_fill_(hidden, -torch.inf).unsqueeze(2)
            )
        found = gather(*queries, self.caches[number % len(self.caches)], SCALE, barrier)
        return found.flatten(0, 1)

    def lifted(self) -> Callable[[int], Tensor]:
        """SDPA of the same queries over keys and values of all heads, which are drawn, not lifted."""
        like = self.caches[0]
        key = torch.randn(
            self.batch, self.heads, self.context, NOPE + ROPE, dtype=like.dtype, device=like.device
        )
        value = key[..., :V].clone()
        query = torch.randn_like(key[:, :, : self.new])
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda number: attention(query, key, value, scale=SCALE)


def error(shape: Shape) -> float:
    """Largest difference from FP32 over the largest latent, for a few texts of different lengths."""
    few = Shape(min(shape.batch, 8), shape.context, shape.heads, shape.new, shape.q_latent.device)
    shorter = (
        torch.arange(few.batch, device=few.slots.device).unsqueeze(1) * 1037 % (few.context - few.new + 1)
    )
    slots = few.slots - shorter
    ours, wanted = few.ours(0, slots).float(), few.gather(0, slots)
    return float((ours - wanted).abs().max() / few.caches[0].abs().max())


def time_in_turn(
    tasks: dict[str, Callable[[int], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each task; the device is busy with a copy while one is launched."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for turn in range(2 + repeats):
        for name, task in tasks.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            target.copy_(source)
            begin.record()
            task(turn)
            end.record()
            end.synchronize()
            if turn >= 2:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(shape: Shape, peaks: dict[str, Any], repeats: int, sweep: bool) -> dict[str, Any]:
    """One shape; what does not fit the memory set aside for it is left out."""
    device = shape.q_latent.device
    tasks: dict[str, Callable[[int], object]] = {"ours": shape.ours}
    keys = shape.batch * shape.heads * shape.context
    if shape.batch * shape.context * (RANK + ROPE) * 4 + keys * shape.new * 8 < FP32_BYTES:
        tasks["gather"] = shape.gather
    if keys * (NOPE + ROPE + V) * 2 < LIFTED_BYTES and shape.heads > 1:
        tasks["sdpa_lifted"] = shape.lifted()
    bytes_s, operations_s = shape.moved_bytes / peaks["copy"], shape.operations / peaks["bf16"]
    times = time_in_turn(tasks, repeats, device)
    if sweep:
        times |= time_in_turn(variants(shape), repeats, device)
    bound = max(bytes_s, operations_s)
    found = {
        name: {"us": round(s * 1e6, 1), "of_copy": round(bytes_s / s, 3), "of_bound": round(bound / s, 3)}
        for name, s in times.items()
    }
    sizes = {name: getattr(shape, name) for name in ("batch", "context", "heads", "new")}
    return sizes | {"bound_us": round(bound * 1e6, 1), "copy_us": round(bytes_s * 1e6, 1), "results": found}


def variants(shape: Shape) -> dict[str, Callable[[int], object]]:
    """Ours with other tiles and numbers of programs a text; what does not fit is left out."""
    from moe_runtime.model.latent_attention_triton import ROWS, Tile

    made: dict[str, Callable[[int], object]] = {}
    many = shape.heads * shape.new >= ROWS
    wanted = [({"tile": Tile(*tile)}, f"tile {tile}") for tile in (SWEEP if many else SWEEP_OF_FEW)]
    wanted += [({"parts": parts}, f"parts {parts}") for parts in (1, 2, 4, 8, 16, 32)]
    for options, name in wanted:

        def run(number: int, options: dict[str, Any] = options) -> object:
            return shape.ours(number, **options)

        try:
            run(0)
        except Exception as problem:  # no room in shared memory, say
            print(f"{name} is left out: {str(problem)[:200]}", file=sys.stderr)
            continue
        made[name] = run
    return made


def shapes(options: argparse.Namespace, device: torch.device) -> Iterator[Shape]:
    """All shapes asked for, one at a time."""
    for heads in options.heads:
        for new in options.new:
            for context in options.context:
                for batch in options.batch:
                    yield Shape(batch, context, heads, new, device)


def main(arguments: list[str] | None = None) -> int:
    """Check and time each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, numbers in (
        ("batch", [1, 32, 256]),
        ("context", [4096, 32768]),
        ("heads", [128]),
        ("new", [1]),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=numbers)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sweep", action="store_true", help="other tiles and numbers of programs too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("latent_attention: expected a CUDA device, found none", file=sys.stderr)
        return 2
    device, peaks = torch.device("cuda"), measure_peaks()
    print(
        json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__} | peaks), flush=True
    )
    is_wrong = False
    for shape in shapes(options, device):
        off = error(shape)
        if not off <= TOLERANCE:
            is_wrong = True
            print(f"latent_attention: expected an error of at most {TOLERANCE}, got {off}", file=sys.stderr)
        found = measure(shape, peaks, options.repeats, options.sweep)
        print(json.dumps(found | {"error": off}), flush=True)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
