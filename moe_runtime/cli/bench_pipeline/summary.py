"""From what ranks said of steps to figures: time beside that of the first contender, sums beside its sums."""

import statistics
from typing import Any

from moe_runtime.cli.bench_pipeline.calibrate import Step
from moe_runtime.cli.bench_pipeline.settings import Settings
from moe_runtime.cli.bench_pipeline.traces import figures, trace_of

TOLERANCE = 1e-4
_MEANS = ("exchange_s", "exchange_wait_s", "transfer_wait_s", "link_bytes")


def summarise(
    checked: dict[str, Step], rounds: list[dict[str, Step]], settings: Settings
) -> list[dict[str, Any]]:
    """One line for each contender.

    Args:
        checked: a step of each, with gradients.
        rounds: steps of each, in turn.
        settings: of the measurement.
    """
    first = next(iter(checked))
    losses = {name: _loss(step, settings) for name, step in checked.items()}
    norms = {name: _norms(step) for name, step in checked.items()}
    lines = []
    for name in checked:
        steps = [turn[name] for turn in rounds]
        seconds = [step_s(step) for step in steps]
        ratios = [own / step_s(turn[first]) for own, turn in zip(seconds, rounds, strict=True)]
        worst = max(_apart(norms[name][key], wanted) for key, wanted in norms[first].items())
        line = {
            "contender": name,
            "s": statistics.median(seconds),
            "s_low": min(seconds),
            "s_high": max(seconds),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "loss": losses[name],
            "loss_apart": _apart(losses[name], losses[first]),
            "gradients_apart": worst,
            "gradient_norm": sum(norm**2 for norm in norms[name].values()) ** 0.5,
            "exchange_bytes": sum(rank["exchange_bytes"] for rank in steps[-1]),
            "cpu_s": statistics.median(sum(rank["cpu_s"] for rank in step) for step in steps),
        }
        line["is_equal"] = max(line["loss_apart"], worst) <= TOLERANCE
        line |= {key: _mean(steps, key) for key in _MEANS}
        trace = trace_of(steps[-1], settings)
        line |= {"hidden_in_pairs": None, "simulated": None} if trace is None else figures(trace)
        line["hidden"] = 1 - line["exchange_wait_s"] / line["exchange_s"]
        lines.append(line)
    return lines


def step_s(step: Step) -> float:
    """From the first rank's beginning to the last one's end; all read one clock."""
    return max(rank["end"] for rank in step) - min(rank["begin"] for rank in step)


def _loss(step: Step, settings: Settings) -> float:
    """Mean over all microbatches of all lanes."""
    return sum(rank["loss"] for rank in step) / settings.ep


def _norms(step: Step) -> dict[str, float]:
    """Norm of each parameter's gradient."""
    squares: dict[str, float] = {}
    for rank in step:
        for name, share in rank["squares"].items():
            squares[name] = squares.get(name, 0.0) + share
    return {name: square**0.5 for name, square in squares.items()}


def _apart(value: float, wanted: float) -> float:
    return abs(value - wanted) / max(abs(wanted), 1e-30)


def _mean(steps: list[Step], key: str) -> float | None:
    """Median over steps of the mean over ranks; None if not known."""
    if steps[0][0].get(key) is None:
        return None
    return statistics.median(statistics.mean(rank[key] for rank in step) for step in steps)
