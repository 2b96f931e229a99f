"""Memory of thousands of layouts: `rank_memory`, with everything that layouts share reckoned once.

    what                                    depends on
    states (weights, masters, moments)      the stages of a rank, ep, dp, ZeRO stage, moments
    bytes of a microbatch in a layer        recompute, and whether rows travel; then tokens and rows
    live microbatches                       the program (`digest.py`)
    buffers of exchanges                    ep, size of a microbatch, whether the program overlaps

A test holds the sums to `rank_memory`.
"""

from collections.abc import Hashable, Iterable
from operator import mul
from typing import Any

from moe_runtime.config.schema import OptimConfig, RecomputeConfig, RunConfig
from moe_runtime.planner.reckon.buffers import boundary_bytes, dispatcher_bytes
from moe_runtime.planner.reckon.digest import Digest
from moe_runtime.planner.reckon.kept import CPU, CUDA, Kept, Live, padded_rows
from moe_runtime.planner.reckon.memory import ALLOWANCE, IMBALANCE, run_shape, stage_tensors
from moe_runtime.planner.reckon.parts import StageParts, stage_parts
from moe_runtime.planner.reckon.space import Frame
from moe_runtime.planner.reckon.states import States, rank_states
from moe_runtime.planner.reckon.workspace import phase_bytes

Sums = tuple[float, float, float, float]  # bytes for each token, row and row of whole tiles, and once
Stage = tuple[tuple[Sums, ...], Sums]  # what each block keeps, and what waits for W


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
        self._sums: dict[Hashable, Stage] = {}
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
            config = RunConfig(**_parts(frame.config) | {"recompute": recompute})
            parts = stage_parts(config.model, layout)
            widest = [phase_bytes(config, shape, self._keeping, one) for one in parts]
            self._active[key] = [
                row.fullest(stages)
                + max(widest[stage] for stage in row.stages)
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
        sizes = (shape.tokens, shape.rows, padded_rows(shape), 1.0)
        found = []
        for layers, parts in zip(layout.layers, stage_parts(self._config.model, layout), strict=True):
            blocks, owed = self._of_stage(frame, layers, parts, recompute)
            kept = tuple(sum(map(mul, block, sizes)) for block in blocks)
            found.append(Live(kept, sum(map(mul, owed, sizes))))
        return found

    def _of_stage(self, frame: Frame, layers: range, parts: StageParts, recompute: RecomputeConfig) -> Stage:
        key = (layers, parts, recompute, frame.layout.ep > 1)
        if key not in self._sums:
            config = RunConfig(**_parts(frame.config) | {"recompute": recompute})
            self._sums[key] = _sums(stage_tensors(config, layers, parts, self._keeping))
        return self._sums[key]


def _sums(blocks: Iterable[Iterable[Kept]]) -> Stage:
    """Of what is there until the backward for inputs, and of what waits for weight gradients."""
    kept = [list(block) for block in blocks]
    whole = tuple(_sum(one for one in block if one.life != "between") for block in kept)
    return whole, _sum(one for block in kept for one in block if one.life != "to_input_grad")


def _sum(tensors: Iterable[Kept]) -> Sums:
    sizes = [(one.token, one.row, one.padded, one.once) for one in tensors]
    token, row, padded, once = (sum(column) for column in zip((0.0, 0.0, 0.0, 0.0), *sizes, strict=True))
    return token, row, padded, once


def _held(states: States) -> float:
    return states.weights + states.gradients + states.masters + states.moments + states.weight_casts


def _parts(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RunConfig.model_fields}
