"""What follows from a config: weights, batch sizes and tokens at every step, the number of steps.

The batch ramp is piecewise constant: the ideal size grows linearly with the tokens seen and is rounded
to the nearest size that the layout admits. So the step at which each size begins, and the tokens
before it, follow by integer arithmetic from level to level; no running sum over steps is kept, and the
answer for a step is the same on every rank and after every restart.

Another layout may admit other sizes, and a user may resume with another batch. Counting then goes on from
where the checkpoint stood (`ResolvedLayout.taken_over`), so that no data is seen twice or left out; under an
unchanged config that is the count from the beginning.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_runtime.config.axes import admissible_size
from moe_runtime.config.counts import ParameterCounts, count_parameters
from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig

__all__ = [
    "ParameterCounts",
    "batch_levels",
    "batch_size_at",
    "count_parameters",
    "sequences_before",
    "tokens_before",
    "tokens_per_step",
    "total_steps",
]


@dataclass(frozen=True)
class _Level:
    """Steps of one batch size: from `first_step`, before which `tokens` were seen, on."""

    first_step: int
    tokens: int
    size: int


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of a step after the ramp."""
    return config.batch.global_batch_size * config.batch.seq_len


def batch_size_at(config: RunConfig, layout: ResolvedLayout, step: int) -> int:
    """Sequences of a step, over all lanes.

    Args:
        step: number of the step, from 0.

    Ref: DSV3 §4.2.
    """
    return _level_at(config, layout, step).size


def sequences_before(config: RunConfig, layout: ResolvedLayout, step: int) -> int:
    """Sequences of all steps before this one, over all lanes; exact."""
    return tokens_before(config, layout, step) // config.batch.seq_len


def tokens_before(config: RunConfig, layout: ResolvedLayout, step: int) -> int:
    """Tokens of all steps before this one, over all lanes; exact."""
    level = _level_at(config, layout, step)
    return level.tokens + (step - level.first_step) * level.size * config.batch.seq_len


def total_steps(config: RunConfig, layout: ResolvedLayout) -> int:
    """Steps of the whole run: `total_steps`, or as many as see `total_tokens`, the smaller if both."""
    limits = []
    if config.train.total_steps is not None:
        limits.append(config.train.total_steps)
    if config.train.total_tokens is not None:
        limits.append(_steps_for(config, layout, config.train.total_tokens))
    return min(limits)


def batch_levels(config: RunConfig, layout: ResolvedLayout, steps: int) -> list[tuple[int, int]]:
    """How many of the first `steps` steps have which size: (steps, sequences), in order."""
    levels = list(_levels(config, layout))
    ends = [level.first_step for level in levels[1:]] + [steps]
    counts = [min(end, steps) - level.first_step for level, end in zip(levels, ends, strict=True)]
    return [(count, level.size) for count, level in zip(counts, levels, strict=True) if count > 0]


def _steps_for(config: RunConfig, layout: ResolvedLayout, tokens: int) -> int:
    last = next(_levels(config, layout))
    for level in _levels(config, layout):
        if level.tokens >= tokens:
            break
        last = level
    per_step = last.size * config.batch.seq_len
    return last.first_step - (last.tokens - tokens) // per_step  # minus a floor: rounds up


def _level_at(config: RunConfig, layout: ResolvedLayout, step: int) -> _Level:
    last = next(_levels(config, layout))
    for level in _levels(config, layout):
        if level.first_step > step:
            break
        last = level
    return last


def _levels(config: RunConfig, layout: ResolvedLayout) -> Iterator[_Level]:
    """The levels of the ramp in order; each lasts as long as the nearest admissible size stays the same."""
    batch, quantum = config.batch, layout.batch_quantum
    step, tokens = layout.taken_over
    size = admissible_size(batch, quantum, layout.smallest_batch, tokens)
    yield _Level(step, tokens, size)
    while size < batch.global_batch_size and batch.ramp_start_size is not None:
        # The first number of tokens at which the ideal size is nearer to the next multiple up.
        numerator = batch.ramp_tokens * (2 * size + quantum - 2 * batch.ramp_start_size)
        boundary = -(-numerator // (2 * (batch.global_batch_size - batch.ramp_start_size)))
        per_step = size * batch.seq_len
        num_steps = max(1, -((tokens - boundary) // per_step))
        step, tokens = step + num_steps, tokens + num_steps * per_step
        size = admissible_size(batch, quantum, layout.smallest_batch, tokens)
        yield _Level(step, tokens, size)
