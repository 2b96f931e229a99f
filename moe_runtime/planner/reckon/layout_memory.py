"""Memory of thousands of layouts: `rank_memory`, with everything that layouts share reckoned once.

    what                                    depends on
    states (weights, masters, moments)      the stages of a rank, ep, dp, ZeRO stage, moments
    bytes of a microbatch in a layer        recompute, and whether rows travel; then tokens and rows
    live microbatches                       the program (`digest.py`)
    buffers of exchanges                    ep, size of a microbatch, whether the program overlaps

A test holds the sums to `rank_memory`.
"""

from collections.abc import Hashable, Iterable
from typing import Any

from moe_runtime.config.schema import OptimConfig, RecomputeConfig, RunConfig
from moe_runtime.planner.reckon.buffers import boundary_bytes, dispatcher_bytes
from moe_runtime.planner.reckon.digest import Digest
from moe_runtime.planner.reckon.kept import CPU, CUDA, Kept, Live
from moe_runtime.planner.reckon.memory import ALLOWANCE, IMBALANCE, run_shape, stage_tensors
from moe_runtime.planner.reckon.parts import StageParts, stage_parts
from moe_runtime.planner.reckon.space import Frame
from moe_runtime.planner.reckon.states import States, rank_states

Sums = tuple[float, float, float]  # bytes for each token, for each row, and once


class LayoutMemory:
    """Totals of the fullest rank.

    Args:
        config: the run whose layouts are looked at.
        imbalance, allowance: as in `rank_memory`.
    """

    def __init__(self, config: RunConfig, imbalance: float = IMBALANCE, allowance: float = ALLOWANCE) -> None:
        self._config, self._imbalance, self._allowance = config, imbalance, allowance
        self._keeping = CPU if config.device == "cpu" else CUDA
        self._states: dict[Hashable, list[States]] = {}
        self._sums: dict[Hashable, tuple[Sums, Sums]] = {}
        self._active: dict[Hashable, list[float]] = {}
        self._buffers: dict[Hashable, float] = {}

    def totals(self, frame: Frame, digest: Digest, recompute: RecomputeConfig, moments: str) -> list[float]:
        """Bytes of each pipeline rank, the margin included."""
        states, active = self._of_states(frame, moments), self._of_activity(frame, digest, recompute)
        return [
            (_held(one) + max(moving, one.at_update)) * (1 + self._allowance)
            for one, moving in zip(states, active, strict=True)
        ]

    def _of_states(self, frame: Frame, moments: str) -> list[States]:
        layout, wanted = frame.layout, frame.config.layout
        key = (layout.placement, layout.dp, layout.ep, wanted.zero_stage, moments)
        if key not in self._states:
            optim = OptimConfig(**self._config.optim.model_dump() | {"moments": moments})
            config = RunConfig(**_parts(frame.config) | {"optim": optim})
            self._states[key] = [rank_states(config, layout, rank) for rank in range(layout.pp)]
        return self._states[key]

    def _of_activity(self, frame: Frame, digest: Digest, recompute: RecomputeConfig) -> list[float]:
        """Activations at their fullest, and buffers, of each rank."""
        layout, size = frame.layout, frame.config.batch.micro_batch_size
        key = (id(digest), layout.ep, layout.dispatcher, size, recompute)
        if key not in self._active:
            stages = self._of_stages(frame, recompute)
            shape = run_shape(frame.config, layout, self._imbalance)
            self._active[key] = [
                row.fullest(stages)
                + self._of_exchanges(frame, digest, rank)
                + boundary_bytes(frame.config, row.boundary, shape)
                for rank, row in enumerate(digest.rows)
            ]
        return self._active[key]

    def _of_exchanges(self, frame: Frame, digest: Digest, rank: int) -> float:
        layout, size = frame.layout, frame.config.batch.micro_batch_size
        key = (layout.ep, layout.dispatcher, size, digest.rows[rank].overlaps)
        if key not in self._buffers:
            shape = run_shape(frame.config, layout, self._imbalance)
            self._buffers[key] = dispatcher_bytes(frame.config, layout, digest.sample, rank, shape)
        return self._buffers[key]

    def _of_stages(self, frame: Frame, recompute: RecomputeConfig) -> list[Live]:
        """Bytes of one microbatch in each stage."""
        layout = frame.layout
        shape = run_shape(frame.config, layout, self._imbalance)
        found = []
        for layers, parts in zip(layout.layers, stage_parts(self._config.model, layout), strict=True):
            whole, owed = self._of_stage(frame, layers, parts, recompute)
            found.append(Live(*(a * shape.tokens + b * shape.rows + c for a, b, c in (whole, owed))))
        return found

    def _of_stage(
        self, frame: Frame, layers: range, parts: StageParts, recompute: RecomputeConfig
    ) -> tuple[Sums, Sums]:
        key = (layers, parts, recompute, frame.layout.ep > 1)
        if key not in self._sums:
            config = RunConfig(**_parts(frame.config) | {"recompute": recompute})
            self._sums[key] = _sums(stage_tensors(config, layers, parts, self._keeping))
        return self._sums[key]


def _sums(tensors: Iterable[Kept]) -> tuple[Sums, Sums]:
    """Of what is there until the backward for inputs, and of what waits for weight gradients."""
    kept = list(tensors)
    whole = [one for one in kept if one.life != "between"]
    owed = [one for one in kept if one.life != "to_input_grad"]
    return _sum(whole), _sum(owed)


def _sum(tensors: list[Kept]) -> Sums:
    token, row, once = (sum(getattr(one, name) for one in tensors) for name in ("token", "row", "once"))
    return token, row, once


def _held(states: States) -> float:
    return states.weights + states.gradients + states.masters + states.moments + states.weight_casts


def _parts(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RunConfig.model_fields}
