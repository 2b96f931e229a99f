"""Routing of a step, layer by layer: who measures what, and the spread over the layers.

Loads are counted over the global batch, biases are alike on all replicas: one holder of each stage tells
them. What the routers' meters summed up is another matter: every rank saw other tokens, so every rank adds
its part.
"""

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_runtime.config.counts import moe_layers
from moe_runtime.metrics.balance import (
    dead_experts,
    is_starved,
    load_entropy,
    rank_load_ratio,
    relative_load,
    unchecked_violation,
    violation,
)
from moe_runtime.metrics.record import SPREAD
from moe_runtime.metrics.window import LoadWindow
from moe_runtime.model.router_meter import QUANTITIES
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.train.meters.one_sum import OneSum

_HELD = (
    "load_max",
    "load_min",
    "violation",
    "violation_global",
    "load_entropy",
    "dead_experts",
    "starved_steps",
    "unchecked_violation",
    "rank_load_ratio",
    "bias_min",
    "bias_max",
    "bias_std",
)
Layers = dict[str, dict[str, Any]]


class RoutingMeter:
    """Measures the MoE layers that this rank holds and reads what all ranks measured.

    Args:
        runtime: of this rank.

    Attributes:
        starved: int64 [held layers, experts], for how many steps in a row each expert has been without tokens
            and its bias no help; zeros on a rank that does not tell of its layers.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        model = runtime.config.model
        self.layers = moe_layers(model)
        self._rows = [self.layers.index(layer) for layer in runtime.load.layers]
        self._routers = [moe.router for chunk in runtime.chunks.values() for _, moe in chunk.moe_layers()]
        self._is_owner = runtime.mesh.is_stage_owner and bool(self._rows)
        eligible = model.num_experts // model.num_groups * min(model.num_groups, model.num_groups_kept)
        self._has_margin = eligible > model.top_k
        self.forget()

    def forget(self) -> None:
        """What comes now does not follow on what was measured before."""
        size = self._runtime.config.metrics.window if self._is_owner else 0
        self._window = LoadWindow(size, len(self._rows), self._runtime.config.model.num_experts)
        self.starved = torch.zeros(len(self._rows), self._runtime.config.model.num_experts, dtype=torch.int64)

    def shapes(self, with_load: bool) -> dict[str, tuple[int, ...]]:
        """Tables that this needs; `with_load`: every expert's load too."""
        rows = len(self.layers)
        load = {"load": (rows, self._runtime.config.model.num_experts)} if with_load else {}
        return {"held": (rows, len(_HELD)), "routers": (rows, len(QUANTITIES)), **load}

    def fill(self, tables: OneSum, total: Tensor, is_moving: bool) -> None:
        """Put in what this rank has to tell.

        Args:
            total: int64 [held layers, experts], counts over the global batch.
            is_moving: biases followed the load in this step.
        """
        if not self._rows:
            return
        tables["routers"][self._rows] = self._runtime.meters.sums()
        if not self._is_owner:
            return
        counts = total.cpu()
        self._window.add(counts)
        load = relative_load(counts)
        biases = torch.stack([router.bias for router in self._routers]).cpu().double()
        columns = (
            load.amax(dim=1),
            load.amin(dim=1),
            violation(load),
            violation(relative_load(self._window.total)),
            load_entropy(load),
            dead_experts(load),
            *self._unmended(load, biases, is_moving),
            rank_load_ratio(load, self._runtime.mesh.ep),
            biases.amin(dim=1),
            biases.amax(dim=1),
            biases.std(dim=1, correction=0),
        )
        tables["held"][self._rows] = torch.stack([column.double() for column in columns], dim=1)
        wanted = tables.get("load")
        if wanted is not None:
            wanted[self._rows] = load

    def _unmended(self, load: Tensor, biases: Tensor, is_moving: bool) -> tuple[Tensor, Tensor]:
        """What balancing leaves as it is: [held layers] each."""
        self.starved = (self.starved + 1).masked_fill(~is_starved(load, biases, is_moving), 0)
        unchecked = unchecked_violation(relative_load(self._window.total), biases, is_moving)
        if not self._window.is_full:  # a few steps prove nothing
            unchecked.fill_(math.nan)
        return self.starved.amax(dim=1), unchecked

    def read(self, tables: OneSum, new_tokens: int) -> Layers:
        """Every layer's numbers, by its canonical prefix, once the tables are summed.

        Args:
            new_tokens: tokens of the step; each passes every layer once.
        """
        rows = zip(self.layers, tables["held"].tolist(), tables["routers"].tolist(), strict=True)
        return {layer: self._of_a_layer(held, sums, new_tokens) for layer, held, sums in rows}

    def _of_a_layer(self, held: list[float], sums: list[float], new_tokens: int) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(_HELD, held, strict=True))
        unchecked = values["unchecked_violation"]
        square, z_loss, margin, nodes = (total / new_tokens for total in sums)
        square /= self._runtime.config.model.num_experts
        return values | {
            "dead_experts": int(values["dead_experts"]),
            "starved_steps": int(values["starved_steps"]),
            "unchecked_violation": None if math.isnan(unchecked) else unchecked,
            "bias_range": values["bias_max"] - values["bias_min"],
            "bias_reach": max(abs(values["bias_min"]), abs(values["bias_max"])),
            "logit_rms": math.sqrt(square) if square >= 0 else math.nan,
            "z_loss": z_loss,
            "top_k_margin": margin if self._has_margin else None,
            "nodes_per_token": nodes,
        }


def summary(layers: Layers) -> dict[str, Any]:
    """What a record says of all layers together; nothing where there are none."""
    if not layers:
        return {}
    violations = {layer: values["violation"] for layer, values in layers.items()}
    return {
        "max_violation": sum(violations.values()) / len(violations),
        "worst_layer": max(violations, key=lambda layer: violations[layer]),
        "rank_load_ratio": max(values["rank_load_ratio"] for values in layers.values()),
        "routing": {name: _spread([values[name] for values in layers.values()]) for name in SPREAD},
    }


def detail(layers: Layers) -> Layers:
    """What a record says of each layer."""
    return {
        layer: {name: _short(value) for name, value in values.items() if name != "rank_load_ratio"}
        for layer, values in layers.items()
    }


def _spread(values: list[Any]) -> dict[str, Any]:
    if values[0] is None:  # of one layer, then of all
        return {}
    return {"min": _short(min(values)), "p50": _short(median(values)), "max": _short(max(values))}


def _short(value: Any) -> Any:
    """Seven digits: as many as the sums behind it have, and half as many as a record of 58 layers needs."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
