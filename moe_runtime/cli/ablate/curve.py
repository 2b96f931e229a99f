"""The equal-compute curve: the lowest loss that training FLOPs can buy, over models of several sizes.

Every arm is one size, trained with a constant learning rate, so that its validation loss on the way is what a
shorter run would have ended with. At each budget C the arms' losses are read off by interpolation in log C,
and the lowest of them is the frontier, as long as it is neither the smallest size nor the largest: at an end
of the ladder a size that was not tried may do better. Through the frontier goes

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

BUDGETS = 24
LEAST_POINTS = 6  # for three unknowns
LEAST_SPAN = 4.0  # from the first budget of a fit to its last; over less a power law says nothing
SHOWN = 6


@dataclass(frozen=True)
class Frontier:
    """Budgets and what they buy.

    Args:
        flops: of each budget, ascending.
        losses: by arm, at each budget; nan where the arm has none there.
        best: the arm with the lowest loss at each budget.
        lowest: that loss.
        inside: bool, the best is neither the first nor the last arm.
    """

    flops: np.ndarray
    losses: dict[str, np.ndarray]
    best: list[str]
    lowest: np.ndarray
    inside: np.ndarray

    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Budgets and losses for the fit: those inside the ladder, all if they are too few or too near."""
        within = self.flops[self.inside]
        enough = len(within) >= LEAST_POINTS and within[-1] >= LEAST_SPAN * within[0]
        chosen = self.inside if enough else np.ones_like(self.inside)
        return self.flops[chosen], self.lowest[chosen]


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
    """The lowest losses over budgets, from where the second arm begins to where the first one ends.

    Args:
        curves: by arm, in ascending size, (training FLOPs, validation loss) in ascending order.

    Raises:
        ValueError: fewer than two arms, or no budget that they share.
    """
    if len(curves) < 2:
        raise ValueError(f"expected at least two sizes, got {len(curves)}")
    points = {arm: np.asarray(curve, np.float64) for arm, curve in curves.items()}
    first = sorted(curve[0, 0] for curve in points.values())[1]
    last = min(curve[-1, 0] for curve in points.values())
    if not first < last:
        raise ValueError("expected training FLOPs that two sizes share, got none")
    budgets = np.geomspace(first, last, BUDGETS)
    losses = {arm: _read_off(curve, budgets) for arm, curve in points.items()}
    table = np.stack(list(losses.values()))
    places = np.nanargmin(table, axis=0)
    best = [list(losses)[place] for place in places]
    inside = (places > 0) & (places < len(losses) - 1)
    return Frontier(budgets, losses, best, np.nanmin(table, axis=0), inside)


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
    flops, losses = found.fitted()
    known = 2 * len(flops) // 3
    return float(fit(flops[:known], losses[:known]).at(flops[-1]) / losses[-1] - 1)


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
    if len(curves) < 2 or min(map(len, curves.values())) < LEAST_POINTS:
        return f"The curve needs at least two sizes, each evaluated {LEAST_POINTS} times or more on its way."
    found = frontier(curves)
    flops, lowest = found.fitted()
    law = fit(flops, lowest)
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
    miss = np.abs(np.log(law.at(flops) / lowest)).max()
    ladder = "" if len(flops) == found.inside.sum() else ", ends of the ladder among them"
    formula = f"{law.floor:.3f} + {law.scale:.3f} (C / {law.unit:.2e})^-{law.exponent:.3f}"
    text = (
        f"Fit over {len(flops)} of {len(found.flops)} budgets{ladder}: L(C) = {formula}, at most "
        f"{100 * miss:.2f}% off the frontier; without the upper third of the budgets it misses the last by "
        f"{100 * unseen_error(found):+.2f}%."
    )
    return "\n".join([*lines, "", text])


def _mean_curve(curves: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Of runs that were evaluated at the same places."""
    return [
        (points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)
    ]


def _shown(loss: float) -> str:
    return "-" if loss != loss else f"{float(loss):.4f}"
