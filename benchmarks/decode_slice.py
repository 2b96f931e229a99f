"""Decoding of a slice of DeepSeek-V3 on a GPU, with and without drafts, against the bytes of a pass.

    python benchmarks/decode_slice.py [--experts 256] [--layers 3] [--batch 1 32] [--drafts 0 1] [--kernels]

True widths, one dense layer, the others MoE, one MTP module, BF16, random weights; prompts are not read but
their latents drawn. The engine decodes at temperature 1, as it does for a user. Prints a JSON object a line:
the slice and the speed of a copy, then each batch and number of drafts.

What random weights cannot have is drafts that stand. So whether one stands is a coin of `--acceptance`: a
draft that holds itself impossible always stands (u q < p), one that holds itself certain nearly never (p is
about 1 / vocabulary). MTP modules, head and draws are run all the same; `acceptance` is what came of it.

A pass must read: the weights of attention, dense and shared layers, router and head; those of the experts
that its tokens chose, counted in a pass of its own; the latents of all rows. `bound_ms` is these bytes at the
speed of the copy.

Exit codes: 0; 2 without a CUDA device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_runtime.cli.bench_slice.peaks import measure_peaks
from moe_runtime.cli.bench_slice.shapes import count_parameters, slice_config
from moe_runtime.cli.bench_slice.subject import draw_weights
from moe_runtime.config.counts import cache_width
from moe_runtime.config.schema import ModelConfig
from moe_runtime.generate.engine import Decoding, Engine
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.local_experts import LocalExperts
from moe_runtime.model.transformer import Transformer

WARM_UP = 4  # passes
ENDLESS = 1 << 30  # new tokens


class PrescribedDecoding(Decoding):
    """Decoding of prompts that are known already, with drafts that stand as often as a coin says.

    Args:
        acceptance: probability that a draft stands, if those before it do.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], acceptance: float) -> None:
        super().__init__(engine, requests)
        self.cache.latents.normal_()
        self._acceptance = acceptance
        self._coins = torch.Generator(self.cache.latents.device).manual_seed(3)

    def begin(self, row: int, tokens: list[int]) -> None:
        self.cache.tokens[row, : len(tokens)] = torch.tensor(tokens)
        self.cache.lengths[row] = len(tokens) - 1

    def draw_draft(self, position: int, logits: Tensor) -> Tensor:
        tokens = super().draw_draft(position, logits)
        honest = self.draft_probs[-1]
        coin = torch.rand(len(tokens), 1, generator=self._coins, device=tokens.device)
        falls = (coin >= self._acceptance).to(honest.dtype)
        self.draft_probs[-1] = torch.zeros_like(honest).scatter_(1, tokens.unsqueeze(1), falls)
        return tokens


def make_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> InferenceModel:
    """Random weights, drawn where they lie."""
    model = Transformer(config, dtype=dtype, device=device)
    draw_weights(model, config.init_std, seed=1)
    return InferenceModel(model)


def passes(decoding: Decoding) -> Iterator[tuple[float, int]]:
    """(seconds, new tokens) of each pass; the host has seen all tokens by its end."""
    rows = len(decoding.alive)
    begun, new = time.perf_counter(), 0
    for number, piece in enumerate(decoding, start=1):
        new += len(piece.tokens)
        if number % rows == 0:
            now = time.perf_counter()
            yield now - begun, new
            begun, new = now, 0


class ExpertCount:
    """Counts the experts that are used, layer by layer, while it is entered."""

    def __enter__(self) -> "ExpertCount":
        self.used: list[int] = []
        original = LocalExperts.__call__

        def counted(experts: LocalExperts, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            self.used.append(len(ids.unique()))
            return original(experts, tokens, weights, ids)

        self._patch = patch.object(LocalExperts, "__call__", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def bytes_of_pass(config: ModelConfig, used: Sequence[int], drafts: int, rows: int, slots: int) -> int:
    """What a pass must read, BF16.

    Args:
        used: experts used, of each run of an MoE layer in the pass.
        slots: of each row.
    """
    expert = 3 * config.hidden_size * config.expert_ffn_size
    head = config.vocab_size * config.hidden_size
    plain = changed(config, num_experts=0, mtp_depth=0)
    main = count_parameters(plain) - head  # without the embedding
    routers = (config.num_layers - config.num_dense_layers) * config.num_experts * config.hidden_size
    module = 0
    if drafts:
        only = changed(config, num_layers=1, num_dense_layers=0, num_experts=0, mtp_depth=0)
        module = (
            count_parameters(only)
            - head
            + 2 * config.hidden_size**2
            + config.num_experts * config.hidden_size
        )
    layers = config.num_layers + drafts
    return 2 * (
        main + routers + drafts * module + sum(used) * expert + layers * rows * slots * cache_width(config)
    )


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The config with some counts changed, unchecked: it is only counted."""
    return config.model_construct(**{**config.model_dump(), **changes})


def measure(
    model: InferenceModel, rows: int, drafts: int, options: argparse.Namespace, copy: float
) -> dict[str, Any]:
    """One batch with one number of drafts."""
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(model.config.vocab_size, (rows, options.context), generator=generator).tolist()
    requests = [Request(tokens, ENDLESS, SamplingParams(seed=row)) for row, tokens in enumerate(prompts)]
    decoding = PrescribedDecoding(Engine(model, drafts), requests, options.acceptance)
    seen = passes(decoding)
    next(seen)  # the prompt's
    for _ in range(WARM_UP):
        next(seen)
    with ExpertCount() as count:
        next(seen)
    times, new = zip(*(next(seen) for _ in range(options.passes)), strict=True)
    kernels = profile_pass(seen) if options.kernels else None
    per_row = sum(new) / options.passes / rows
    pass_s = statistics.median(times)
    moved = bytes_of_pass(model.config, count.used, drafts, rows, options.context)
    found = {
        "batch": rows,
        "drafts": drafts,
        "context": options.context,
        "pass_ms": pass_s * 1e3,
        "pass_ms_range": [min(times) * 1e3, max(times) * 1e3],
        "tokens_per_pass": per_row,
        "tokens_per_s": rows * per_row / pass_s,
        "experts_used": count.used,
        "bytes": moved,
        "bound_ms": moved / copy * 1e3,
        "of_bound": moved / copy / pass_s,
    }
    if drafts:
        found["acceptance"] = (per_row - 1) / drafts
    return found if kernels is None else found | {"kernels": kernels}


def profile_pass(seen: Iterator[tuple[float, int]]) -> dict[str, Any]:
    """Kernels of one pass."""
    from torch.profiler import ProfilerActivity, profile

    from moe_runtime.cli.bench_slice.kernels import summarise

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        next(seen)
        torch.cuda.synchronize()
    events = [(e.key, e.self_device_time_total / 1e3, e.count) for e in found.key_averages()]
    return summarise([event for event in events if event[1] > 0])


def main(arguments: list[str] | None = None) -> int:
    """Make the slice, decode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument(
        "--layers", type=int, default=3, help="one dense, the others MoE; an MTP module besides"
    )
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--acceptance", type=float, default=0.85, help="of a draft")
    parser.add_argument("--passes", type=int, default=20, help="timed")
    parser.add_argument("--kernels", action="store_true", help="the longest kernels of a pass too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("decode_slice: expected a CUDA device, found none", file=sys.stderr)
        return 2
    config = slice_config(options.experts, options.vocab).model_copy(
        update={"num_layers": options.layers, "mtp_depth": 1}
    )
    copy = measure_peaks()["copy"]
    model = make_model(config, torch.device("cuda"), torch.bfloat16)
    about = {"experts": options.experts, "layers": options.layers, "vocab": options.vocab}
    weights_gib = torch.cuda.memory_allocated() / 2**30
    print(
        json.dumps(
            {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": copy}
            | about
            | {"weights_gib": weights_gib}
        ),
        flush=True,
    )
    for rows in options.batch:
        for drafts in options.drafts:
            print(json.dumps(measure(model, rows, drafts, options, copy)), flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
