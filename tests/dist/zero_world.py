"""A toy model spread over four ranks, and the same model in one process with plain AdamW arithmetic.

Gradients are given by hand, a pure function of (step, microbatch, rank, parameter), so the reference
can compute what every rank adds.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.classes import class_of
from moe_runtime.parallel.zero import StepResult, ZeroOptimizer

WORLD = 4
STEPS = 3
LR = 3e-3
EPS = 1e-4  # larger than rounding noise of gradients, which AdamW would blow up to full steps


def make_client(groups: list[dict[str, Any]], moments: str = "fp32") -> AdamW:
    return AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS, moments=moments)


@dataclass(frozen=True)
class Layout:
    """Which ranks share what. `rows[r]` are the stages of pipeline row r, `shapes` those of a stage."""

    rows: tuple[tuple[int, ...], ...]
    dp: int
    ep: int
    shapes: dict[int, dict[str, tuple[int, ...]]]
    replicated: tuple[str, ...] = ()  # this parameter of the last row is a copy of row 0's

    @property
    def is_mirrored(self) -> bool:
        return len(self.rows) > 1 and self.rows[0] == self.rows[-1]

    def peers(self, rank: int) -> list[int]:
        return [r for r in range(WORLD) if self.rows[r // self.dp] == self.rows[rank // self.dp]]

    def expert_peers(self, rank: int) -> list[int]:
        return [r for r in self.peers(rank) if r % self.dp % self.ep == rank % self.dp % self.ep]

    def norm_peers(self, rank: int) -> list[int]:
        half = len(self.rows) // 2
        own = [row for row in range(len(self.rows)) if (row < half) == (rank // self.dp < half)]
        rows = own if self.is_mirrored else list(range(len(self.rows)))
        return [row * self.dp + rank % self.dp for row in rows]

    def names(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Full names and shapes held by a rank; an expert's name tells its expert-parallel rank."""
        held = {}
        for stage in sorted(self.rows[rank // self.dp]):
            for name, shape in self.shapes[stage].items():
                held[f"s{stage}.{name}"] = shape
        return held


DENSE = {"weight": (7, 13), "gain": (3,), "one": (1,), "big": (31, 9)}
EXPERTS = {"experts.up": (2, 11, 3), "experts.down": (2, 3, 5)}
LAYOUTS = {
    # 4 lanes, 2 experts' homes; nothing divides by 4, and some parameters are smaller than the group
    "dp4_ep2": Layout(((0,),), dp=4, ep=2, shapes={0: DENSE | EXPERTS}),
    # two mirrored rows of two stages each: one data-parallel group of 4
    "mirrored_dp2_ep2": Layout(
        ((0, 1), (0, 1)), dp=2, ep=2, shapes={0: DENSE | EXPERTS, 1: {"weight": (5, 3)} | EXPERTS}
    ),
    # four rows; the outer pair has no experts, so pipeline ranks differ in their number of groups
    "mirrored_pp4": Layout(
        ((0, 3), (1, 2), (1, 2), (0, 3)),
        dp=1,
        ep=1,
        shapes={0: DENSE, 1: DENSE | EXPERTS, 2: {"gain": (5,)} | EXPERTS, 3: {"weight": (2, 2)}},
    ),
    # large enough to be reduced to its owners instead of all-reduced
    "large_dp4": Layout(((0,),), dp=4, ep=1, shapes={0: {"weight": (1025, 1024), "gain": (3,)}}),
    # one-way pipeline: the last stage holds a copy of the embedding
    "one_way_pp2": Layout(
        ((0,), (1,)),
        dp=2,
        ep=2,
        shapes={0: {"embed": (17, 3)} | DENSE | EXPERTS, 1: {"embed": (17, 3)} | DENSE | EXPERTS},
        replicated=("s1.embed",),
    ),
}


def noise(*key: object, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    if math.prod(shape) > 2**16:  # a product of two vectors, to save time
        return torch.randn(shape[0], 1, generator=generator) * torch.randn(1, *shape[1:], generator=generator)
    return torch.randn(shape, generator=generator)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()


def is_expert(name: str) -> bool:
    return ".experts." in name


def identity(layout: Layout, name: str, rank: int) -> str:
    """What a parameter is in the whole model: experts differ by home, a copy is its original."""
    if name in layout.replicated:
        return name.replace("s1", "s0")
    return f"{name}@{rank % layout.dp % layout.ep}" if is_expert(name) else name


def gradient(
    layout: Layout, name: str, rank: int, step: int, microbatch: int, shape: tuple[int, ...]
) -> Tensor:
    """What one rank's microbatch adds; copies of the embedding get equal sums before ZeRO."""
    lane = rank % layout.dp if name.endswith("embed") else rank
    return 0.3 * noise("g", identity(layout, name, rank), lane, step, microbatch, shape=shape)


def make_params(layout: Layout, rank: int, dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    named = []
    for name, shape in layout.names(rank).items():
        param = Parameter(noise("w", identity(layout, name, rank), shape=shape).to(dtype))
        if is_expert(name):
            param.is_expert = True
        if name in layout.replicated:
            param.ds_pipe_replicated = True
        named.append((name, param))
    return named


def make_groups(named: list[tuple[str, Parameter]]) -> list[dict[str, Any]]:
    def group(name: str, expert: bool, decay: bool) -> dict[str, Any]:
        params = [p for n, p in named if is_expert(n) == expert and (p.dim() > 1) == decay]
        return {"name": name, "params": params[::-1], "weight_decay": 0.1 if decay else 0.0}

    return [
        group("dense", False, True),
        group("dense_no_decay", False, False),
        group("experts", True, True),
        group("experts_no_decay", True, False),  # always empty: must be left out, not break
    ]


class World:
    """Process groups of the layouts, made alike on every rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        lists = {
            tuple(ranks)
            for layout in LAYOUTS.values()
            for r in range(WORLD)
            for ranks in (layout.peers(r), layout.expert_peers(r), layout.norm_peers(r))
        }
        for ranks in sorted(lists):
            self.groups[ranks] = dist.new_group(list(ranks))

    def open(
        self,
        layout: Layout,
        named: list[tuple[str, Parameter]],
        stage: int = 1,
        clip: float = 0.0,
        moments: str = "fp32",
        bucket_elements: int = 100,  # several buckets, and parameters that do not fit into one
    ) -> ZeroOptimizer:
        mine = {
            key: self.groups[tuple(find(self.rank))]
            for key, find in {
                "dp_group": layout.peers,
                "expert_dp_group": layout.expert_peers,
                "ep_group": layout.norm_peers,  # DeepSpeed only looks whether it is there
                "norm_group": layout.norm_peers,
            }.items()
        }
        return ZeroOptimizer(
            named,
            groups=make_groups(named),
            make_optimizer=partial(make_client, moments=moments),
            stage=stage,  # type: ignore[arg-type]
            grad_clip=clip,
            bucket_elements=bucket_elements,
            **mine,  # type: ignore[arg-type]
        )


def accumulate(param: Parameter, grad: Tensor) -> None:
    if param.grad_accum is None:
        param.grad_accum = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
    param.grad_accum += grad


def train(
    layout: Layout,
    zero: ZeroOptimizer,
    named: list[tuple[str, Parameter]],
    steps: range,
    microbatches: int = 2,
    early: bool = False,
) -> list[StepResult]:
    rank, results = dist.get_rank(), []
    for step in steps:
        for mb in range(microbatches):
            for name, param in named:
                if not (name.endswith("one") and rank == 1):  # idle on one rank alone
                    grad = gradient(layout, name, rank, step, mb, tuple(param.shape)) / microbatches
                    accumulate(param, grad)
                if early:
                    zero.release([param])
            zero.end_microbatch()
        results.append(zero.step(LR, measures_updates=True))
    return results


ByClass = dict[str, float]


def sizes(tensors: dict[str, Tensor]) -> ByClass:
    """Norm of each class of parameters."""
    squares: ByClass = {}
    for key, tensor in tensors.items():
        name = class_of(key)
        squares[name] = squares.get(name, 0.0) + float(tensor.double().square().sum())
    return {name: math.sqrt(square) for name, square in squares.items()}


def reference(
    layout: Layout, dtype: torch.dtype, clip: float, steps: int, microbatches: int = 2
) -> tuple[dict[str, Tensor], list[float], list[ByClass], list[ByClass]]:
    """The whole model in one process: every distinct parameter, FP32 masters, torch AdamW and clipping.

    Returns:
        (weights, gradient norm of each step, norms by class, sizes of updates by class).
    """
    holders: dict[str, list[tuple[int, str]]] = {}
    for rank in range(WORLD):
        for name in layout.names(rank):
            if name not in layout.replicated:
                holders.setdefault(identity(layout, name, rank), []).append((rank, name))
    shapes = {key: layout.names(rank)[name] for key, ((rank, name), *_) in holders.items()}
    masters = {k: Parameter(noise("w", k, shape=s).to(dtype).float()) for k, s in shapes.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in masters.values()],
        lr=LR,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    norms, by_class, updates = [], [], []
    for step in range(steps):
        for key, param in masters.items():
            total = torch.zeros(shapes[key], dtype=torch.float64)
            for rank, name in holders[key]:
                if name.endswith("one") and rank == 1:
                    continue
                for mb in range(microbatches):
                    total += gradient(layout, name, rank, step, mb, shapes[key])
            param.grad = (total / microbatches / len(layout.peers(holders[key][0][0]))).float()
        # In FP64: torch's clip_grad_norm_ is off by 1e-5 for a million elements.
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in masters.values())))
        by_class.append(sizes({key: param.grad for key, param in masters.items()}))
        before = {key: param.detach().clone() for key, param in masters.items()}
        for param in masters.values():
            param.grad *= min(1.0, clip / norms[-1]) if clip else 1.0
        optimizer.step()
        moved = sizes({key: param.detach() - before[key] for key, param in masters.items()})
        updates.append({name: moved[name] / size for name, size in sizes(before).items()})
    return {key: p.detach().to(dtype) for key, p in masters.items()}, norms, by_class, updates
