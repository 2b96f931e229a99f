"""Which layers go to which pipeline stage when the config does not say.

The heaviest stage sets the pace of a pipeline, so its load is made as small as it can be; among the
splits that reach this, the one with the smallest sum of squared loads spreads the rest most evenly.
Two passes of the same dynamic programme: the first finds the smallest possible peak, the second takes
it as a limit. A rule of thumb (layers / stages, less one on the last) was rejected: at 16 stages the
head and the MTP module of DeepSeek-V3 weigh more than four layers, at 2 stages of a small model two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from moe_runtime.config.counts import stage_loads
from moe_runtime.config.schema import ModelConfig


@dataclass(frozen=True, order=True)
class _Split:
    """A way to fill the stages so far: its cost, then the layers of each stage, negated.

    Negated, the smallest of several equally good splits puts more layers on earlier stages.
    """

    cost: int
    counts: tuple[int, ...] = ()

    def with_stage(self, cost: int, num_layers: int) -> "_Split":
        return _Split(cost, (*self.counts, -num_layers))


@cache
def split_layers(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Spreads the layers evenly by load, at least one to every stage; the same answer everywhere.

    Load is the weights that a token is multiplied with; the embedding's row counts on the first
    stage, head and MTP on the last.

    Args:
        num_stages: at most the number of layers.

    Returns:
        The number of layers of each stage.
    """
    layers, first, last = stage_loads(model)
    loads = _StageLoads(tuple(layers), first, last, num_stages)
    peak = _best(loads, lambda cost, load: max(cost, load)).cost
    even = _best(loads, lambda cost, load: cost + load**2, limit=peak)
    return tuple(-count for count in even.counts)


@dataclass(frozen=True)
class _StageLoads:
    layers: tuple[int, ...]
    first: int
    last: int
    num_stages: int

    def of(self, stage: int, begin: int, end: int) -> int:
        extra = self.first * (stage == 0) + self.last * (stage == self.num_stages - 1)
        return sum(self.layers[begin:end]) + extra


def _best(loads: _StageLoads, add: Callable[[int, int], int], limit: int | None = None) -> _Split:
    """The split of least cost; `table[end]` is the best way to put layers [0, end) on the stages so far."""
    table = {0: _Split(0)}
    for stage in range(loads.num_stages):
        grown: dict[int, _Split] = {}
        last_end = len(loads.layers) - (loads.num_stages - 1 - stage)
        for begin, so_far in table.items():
            for end in range(begin + 1, last_end + 1):
                load = loads.of(stage, begin, end)
                if limit is not None and load > limit:
                    break
                option = so_far.with_stage(add(so_far.cost, load), end - begin)
                grown[end] = min(option, grown.get(end, option))
        table = grown
    return table[len(loads.layers)]
