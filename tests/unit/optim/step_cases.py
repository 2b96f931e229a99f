"""Steps to compare: inputs that leave out nothing a fused form could get wrong, and what must be equal."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moe_runtime.optim.counter_rng import derive_key
from moe_runtime.optim.eager_step import eager_step
from moe_runtime.optim.moments import Noise, State, moment_storage
from moe_runtime.optim.statistics import StepStatistics, blank_counters, read_counters
from moe_runtime.optim.update import factors_of

GROUP = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# (elements, global index of the first): a block, tails, no whole block, and a carry of the noise inside
# a block, at a block's boundary, and inside the tail.
LAYOUTS = [
    (1, 0),
    (127, 5),
    (128, 0),
    (6682, 77),
    (1000, (1 << 32) - 300),
    (1024, (1 << 32) - 256),
    (200, (3 << 32) - 150),
]
Step = Callable[..., None]


@dataclass
class Run:
    """Weights and state after some steps, with what was counted."""

    value: torch.Tensor
    state: State
    working: torch.Tensor
    counters: torch.Tensor = field(default_factory=lambda: blank_counters(torch.device("cpu")))

    @property
    def counts(self) -> StepStatistics:
        return read_counters(self.counters, self.value.numel(), 1.0)


def gradients(count: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Lognormal spread; step 3 is a thousand times smaller; a stretch never moves, another falls idle."""
    generator = torch.Generator().manual_seed(100 + step)
    grad = torch.randn(count, generator=generator) * torch.exp(2 * torch.randn(count, generator=generator))
    grad *= 1e-6 if step == 3 else 1e-3
    grad[count // 4 : count // 2] = 0
    if step > 1:
        grad[count // 2 : count // 2 + 50] = 0
    return grad.to(dtype)


def run(
    step_with: Step,
    kind: str,
    count: int,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
    spoil: Callable[[torch.Tensor], None] | None = None,
) -> Run:
    """Take some steps with a fused form, or with `plain`. `spoil` changes the gradient of the last one."""
    value = torch.randn(count, generator=torch.Generator().manual_seed(count))
    made = Run(value, moment_storage(kind).blank(value), torch.full((count,), torch.nan).bfloat16())
    for step in range(1, steps + 1):
        grad = gradients(count, step, dtype)
        if spoil is not None and step == steps:
            spoil(grad)
        noise = Noise(derive_key(0, step, 0), offset)
        counters = made.counters if kind == "fp8" else None
        step_with(value, grad, made.state, factors_of(GROUP, step), noise, made.working, counters)
    return made


def plain(kind: str) -> Step:
    """The eager form with the signature of a fused one."""

    def step(value, grad, state, factors, noise, working, counters) -> None:  # type: ignore[no-untyped-def]
        eager_step(value, grad, moment_storage(kind), state, factors, noise, counters)
        working.copy_(value)

    return step


def differences(ours: Run, expected: Run, working: bool = True) -> list[str]:
    """Names of what has other bits; NaN equals NaN."""
    pairs = {"value": (ours.value, expected.value), "counts": (ours.counts, expected.counts)}
    pairs |= {name: (ours.state[name], expected.state[name]) for name in expected.state}
    if working:
        pairs["working"] = (ours.working, expected.working)
    return [
        name
        for name, (got, want) in pairs.items()
        if not (torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want)
    ]
