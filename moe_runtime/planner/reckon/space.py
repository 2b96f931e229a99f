"""The layouts that a search looks at: every legal way to lay a run on so many accelerators.

    pp                every divisor of the number of accelerators; dp is the rest
    ep                every divisor of dp
    schedule          every one with a builder; interleaved with 2, 4 and 8 stages a rank
    micro_batch_size  every divisor of a lane's sequences
    zero_stage        1, and 2 where there is no pipeline
    recompute         norm, swiglu, mla_up, each on or off
    moments           fp32, bf16, fp8

Everything else (precision, dispatcher, wire, batch, cluster) stays as the run has it. What is legal is not
decided here: it is what `train` asks before it starts (`layout_findings`, rules between sections, limits of
schedules), so nothing is offered that a run would refuse. A combination that is refused is kept with the
words of the refusal.

Left out: schedules that are searched themselves (`auto`, `searched`), which take seconds each; try them on
the winner.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from moe_runtime.config.finding import divisors
from moe_runtime.config.fit import layout_findings
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.rules import cross_findings
from moe_runtime.config.schema import BatchConfig, LayoutConfig, OptimConfig, RecomputeConfig, RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.schedule.builders import BUILDERS, admissible

CHUNKS = (2, 4, 8)
MOMENTS = ("fp32", "bf16", "fp8")
# Findings of these keys look at nothing but pipeline and schedule, and at nothing but ep and dp beside them.
_OF_PIPELINE = ("layout.pp", "layout.schedule", "layout.zero_stage", "layout.layers_per_stage")
_OF_EXPERTS = ("layout.ep", "layout.dispatcher")


@dataclass(frozen=True, slots=True)
class Frame:
    """A legal layout without what is kept and what is computed again.

    Args:
        config: the run with this layout and batch; its recompute and moments are those it had.
        layout: what it resolves to.
    """

    config: RunConfig
    layout: ResolvedLayout

    @property
    def chunks(self) -> int | None:
        """Stages a rank, where the schedule leaves the choice."""
        return self.config.layout.chunks

    def with_choices(self, recompute: RecomputeConfig, moments: str) -> RunConfig:
        """The whole run, validated."""
        optim = self.config.optim.model_dump() | {"moments": moments}
        parts = {name: getattr(self.config, name) for name in RunConfig.model_fields}
        return RunConfig(**parts | {"recompute": recompute, "optim": OptimConfig(**optim)})

    @property
    def keys(self) -> str:
        """The axes as overrides of the run."""
        wanted = self.config.layout
        axes = {key: getattr(wanted, key) for key in ("pp", "dp", "ep", "schedule", "chunks", "zero_stage")}
        return f"{_said(axes)} batch.micro_batch_size={self.config.batch.micro_batch_size}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Layouts that `train` would not start, alike in what is wrong with them.

    Args:
        keys: the axes that they share, as overrides of the run.
        reason: the words of the refusal.
        count: how many, over the axes that are not in `keys`.
    """

    keys: str
    reason: str
    count: int = 1


def frames(config: RunConfig, num_accelerators: int) -> Iterator[Frame | Refusal]:
    """Every layout and batch of a run on so many accelerators, legal or with the reason why not."""
    for pp in divisors(num_accelerators):
        dp = num_accelerators // pp
        eps, sizes = divisors(dp), _micro_batches(config.batch, dp)
        for schedule, chunks in _schedules():
            for zero in (1, 2) if pp == 1 else (1,):
                axes = {"pp": pp, "dp": dp, "schedule": schedule, "chunks": chunks, "zero_stage": zero}
                yield from _of_axes(config, axes, eps, sizes)


def _of_axes(
    config: RunConfig, axes: dict[str, Any], eps: Sequence[int], sizes: Sequence[int]
) -> Iterator[Frame | Refusal]:
    """Every ep and size of a microbatch; what is wrong with the axes whatever these are is said once."""
    refusal = _refused_by(config, axes | {"ep": 1}, sizes[0], _OF_PIPELINE)
    if refusal is not None:
        yield replace(refusal, keys=_said(axes), count=len(eps) * len(sizes))
        return
    for ep in eps:
        refusal = _refused_by(config, axes | {"ep": ep}, sizes[0], _OF_EXPERTS)
        if refusal is not None:
            yield replace(refusal, keys=_said(axes | {"ep": ep}), count=len(sizes))
            continue
        for size in sizes:
            yield _judged(config, axes | {"ep": ep}, size)


def _refused_by(config: RunConfig, axes: dict[str, Any], size: int, keys: Collection[str]) -> Refusal | None:
    """The first refusal of a trial that names one of some keys."""
    wanted, batch = _sections(config, axes, size)
    found = [one for one in layout_findings(config.model, wanted, batch) if one.key in keys]
    return Refusal("", f"{found[0].key}: {found[0].text}") if found else None


def _judged(config: RunConfig, axes: dict[str, Any], size: int) -> Frame | Refusal:
    """The whole check of one layout, as `train` makes it."""
    wanted, batch = _sections(config, axes, size)
    keys = f"{_said(axes)} batch.micro_batch_size={size}"
    parts = {name: getattr(config, name) for name in RunConfig.model_fields}
    trial = RunConfig(**parts | {"layout": wanted, "batch": batch})
    try:
        layout = check_layout(trial)
    except ConfigError as error:
        return Refusal(keys, str(error).splitlines()[0])
    reason = admissible(wanted.schedule, wanted.pp, layout.num_microbatches, wanted.chunks)
    return Frame(trial, layout) if reason is None else Refusal(keys, reason)


def recomputes(config: RunConfig) -> tuple[list[RecomputeConfig], list[Refusal]]:
    """Every choice of what is computed again that the run's model and precision admit, and the others."""
    legal, refused = [], []
    for norm, swiglu, mla_up in product((False, True), repeat=3):
        choice = RecomputeConfig(norm=norm, swiglu=swiglu, mla_up=mla_up)
        parts = {"model": config.model, "recompute": choice, "precision": config.precision}
        found = cross_findings(parts)
        if found:
            keys = f"recompute.norm={norm} recompute.swiglu={swiglu} recompute.mla_up={mla_up}".lower()
            refused.append(Refusal(keys, f"{found[0].key}: {found[0].text}"))
        else:
            legal.append(choice)
    return legal, refused


def _schedules() -> Iterator[tuple[str, int | None]]:
    for name, builder in BUILDERS.items():
        for chunks in (None,) if builder.limits.min_chunks is None else CHUNKS:
            yield name, chunks


def _micro_batches(batch: BatchConfig, dp: int) -> Sequence[int]:
    """Divisors of a lane's sequences; 1 where lanes cannot be filled evenly, to be refused by the rules."""
    return (1,) if batch.global_batch_size % dp else divisors(batch.global_batch_size // dp)


def _sections(config: RunConfig, axes: dict[str, Any], size: int) -> tuple[LayoutConfig, BatchConfig]:
    cleared = {"layers_per_stage": None, "max_live": None, "costs": None}
    batch = BatchConfig(**config.batch.model_dump() | {"micro_batch_size": size})
    return LayoutConfig(**config.layout.model_dump() | cleared | axes), batch


def _said(axes: dict[str, Any]) -> str:
    """The axes as overrides that a user could type."""
    usual = {"chunks": None, "zero_stage": 1}
    order = ("pp", "dp", "ep", "schedule", "chunks", "zero_stage")
    given = {key: axes[key] for key in order if key in axes and (key not in usual or axes[key] != usual[key])}
    return " ".join(f"layout.{key}={value}" for key, value in given.items())
