"""The equal-compute curve: the lowest loss that training FLOPs can buy, over models of several sizes.

Every arm is one size, trained with a constant learning rate, so that its validation loss on the way is what a
shorter run would have ended with. At each budget C the arms' losses are read off by interpolation in log C,
and the lowest of them is the frontier. Through the frontier goes

    L(C) = E + A (C / C0)^-a

fitted by least squares in log L. Whether the fit says anything is tested on budgets that it has not seen: it
is made once more without the upper third of them and asked for the last.

Ref: Hoffmann et al. 2022 §3 (the frontier of training curves, their approach 1); Kaplan et al. 2020.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import curve_fit

BUDGETS = 12
SHOWN = 6


@dataclass(frozen=True)
class Frontier:
    """Budgets and what they buy.

    Args:
        flops: of each budget, ascending.
        losses: by arm, at each budget; nan where the arm has none there.
        best: the arm with the lowest loss at each budget.
        lowest: that loss.
    """

    flops: np.ndarray
    losses: dict[str, np.ndarray]
    best: list[str]
    lowest: np.ndarray


@dataclass(frozen=True)
class Fit:
    """L(C) = floor + scale (C / unit)^-exponent, in nats a token."""

    floor: float
    scale: float
    exponent: float
    unit: float

    def at(self, flops: np.ndarray | float) -> Any:
        """The fitted loss for training FLOPs."""
        return self.floor + self.scale * (np.asarray(flops) / self.unit) ** -self.exponent


def frontier(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Frontier:
    """The lowest losses over budgets that at least two arms span.

    Args:
        curves: by arm, (training FLOPs, validation loss) in ascending order.

    Raises:
        ValueError: fewer than two arms, or no budget that two of them reach.
    """
    if len(curves) < 2:
        raise ValueError(f"expected at least two sizes, got {len(curves)}")
    points = {arm: np.asarray(curve, np.float64) for arm, curve in curves.items()}
    first = sorted(curve[0, 0] for curve in points.values())[1]
    last = sorted(curve[-1, 0] for curve in points.values())[-2]
    if not first < last:
        raise ValueError("expected training FLOPs that two sizes share, got none")
    budgets = np.geomspace(first, last, BUDGETS)
    losses = {arm: _read_off(curve, budgets) for arm, curve in points.items()}
    table = np.stack(list(losses.values()))
    best = [list(losses)[number] for number in np.nanargmin(table, axis=0)]
    return Frontier(budgets, losses, best, np.nanmin(table, axis=0))


def _read_off(curve: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    return np.interp(np.log(budgets), np.log(curve[:, 0]), curve[:, 1], left=np.nan, right=np.nan)


def fit(flops: np.ndarray, losses: np.ndarray) -> Fit:
    """Least squares in log L; floor and exponent are kept from going below zero."""
    unit = float(np.exp(np.log(flops).mean()))

    def law(c: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return np.log(floor + scale * c**-exponent)

    start = (float(losses.min()) / 2, float(losses.mean()) / 2, 0.2)
    found, _ = curve_fit(law, flops / unit, np.log(losses), p0=start, bounds=(0, np.inf), maxfev=20_000)
    floor, scale, exponent = (float(value) for value in found)
    return Fit(floor, scale, exponent, unit)


def unseen_error(found: Frontier) -> float:
    """Relative error at the last budget of a fit that has not seen the upper third of them."""
    known = 2 * len(found.flops) // 3
    guess = fit(found.flops[:known], found.lowest[:known]).at(found.flops[-1])
    return float(guess / found.lowest[-1] - 1)


def curve_of(result: dict[str, Any]) -> list[tuple[float, float]]:
    """(training FLOPs, validation loss) of a run, from its result."""
    each = result["measures"]["flops"] * 1e12 / result["tokens"]
    return [(tokens * each, loss) for tokens, loss in result["curves"]["val_loss"]]


def curve_text(results: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Markdown: losses of each arm (means over seeds) at equal FLOPs, the best, and the fit.

    Args:
        results: by arm, one a seed; arms without any are left out.
    """
    curves = {arm: _mean_curve([curve_of(one) for one in found]) for arm, found in results.items() if found}
    if len(curves) < 2:
        return "The curve needs at least two sizes."
    found = frontier(curves)
    law = fit(found.flops, found.lowest)
    head = ["training FLOPs", *curves, "best", "fit"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for number in np.linspace(0, len(found.flops) - 1, SHOWN).round().astype(int):
        losses = [_shown(values[number]) for values in found.losses.values()]
        cells = [
            f"{found.flops[number]:.2e}",
            *losses,
            found.best[number],
            _shown(law.at(found.flops[number])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    miss = np.abs(np.log(law.at(found.flops) / found.lowest)).max()
    text = (
        f"Fit: L(C) = {law.floor:.3f} + {law.scale:.3f} (C / {law.unit:.2e})^-{law.exponent:.3f}, at most "
        f"{100 * miss:.2f}% off the frontier; "
        f"without the upper third of the budgets it misses the last by {100 * unseen_error(found):+.2f}%."
    )
    return "\n".join([*lines, "", text])


def _mean_curve(curves: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Of runs that were evaluated at the same places."""
    return [
        (points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)
    ]


def _shown(loss: float) -> str:
    return "-" if loss != loss else f"{float(loss):.4f}"
