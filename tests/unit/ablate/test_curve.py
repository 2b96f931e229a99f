"""The equal-compute curve: what was put in comes out, and what it cannot know is refused."""

import numpy as np
import pytest

from moe_runtime.cli.ablate.curve import curve_text, fit, frontier, unseen_error


def _law(n: float, d: np.ndarray) -> np.ndarray:
    """A loss in weights and tokens whose frontier is a power law in 6 n d."""
    return 1.0 + 40.0 * n**-0.4 + 60.0 * d**-0.4


def _curves() -> dict[str, list[tuple[float, float]]]:
    found = {}
    for n in (1e5, 2e5, 4e5, 8e5):
        tokens = np.geomspace(1e12 / 6 / n / 20, 1e13 / 6 / n, 40)
        found[f"n{n:.0e}"] = list(zip(6 * n * tokens, _law(n, tokens), strict=True))
    return found


def test_the_frontier_takes_the_best_size_of_each_budget():
    found = frontier(_curves())
    assert found.best[0] == "n1e+05" and len(set(found.best)) > 1
    assert 0 < found.inside.sum() < len(found.inside) and not found.inside[0]
    every = np.stack(list(found.losses.values()))
    assert (found.lowest <= np.nanmin(every, axis=0)).all()
    assert (np.diff(found.lowest) < 0).all()


def test_a_known_law_is_found_again():
    flops = np.geomspace(1e12, 1e13, 12)
    found = fit(flops, 0.7 + 0.9 * (flops / 3e12) ** -0.15)
    assert found.floor == pytest.approx(0.7, abs=0.02) and found.exponent == pytest.approx(0.15, abs=0.01)


def test_budgets_that_the_fit_has_not_seen_are_met_and_a_break_is_noticed():
    curves = _curves()
    assert abs(unseen_error(frontier(curves))) < 0.01
    last = frontier(curves).fitted()[0][-4]
    broken = {
        arm: [(c, loss * (1.3 if c > last else 1.0)) for c, loss in curve] for arm, curve in curves.items()
    }
    assert abs(unseen_error(frontier(broken))) > 0.1


def test_a_budget_outside_a_size_takes_no_part():
    curves = {"a": [(1.0, 3.0), (10.0, 2.0)], "b": [(5.0, 2.5), (20.0, 1.5)]}
    found = frontier(curves)
    assert found.flops[0] == pytest.approx(5.0) and found.flops[-1] == pytest.approx(10.0)
    with pytest.raises(ValueError, match="two sizes share"):
        frontier({"a": [(1.0, 3.0), (2.0, 2.0)], "b": [(5.0, 2.5), (20.0, 1.5)]})
    with pytest.raises(ValueError, match="at least two sizes"):
        frontier({"a": [(1.0, 3.0), (2.0, 2.0)]})
    assert "at least two sizes" in curve_text({"a": []})
