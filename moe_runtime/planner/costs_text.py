"""Costs as a user types them: F=1,B=2 or F=1,I=1,W=1,C=0.5.

    F         forward                         B         backward; I and W are half of it each
    I, W      backward for input, for weights; with B given too, one of them is the rest of B
    C, CB     expert exchange of a forward, of a backward (CB is as long as C unless given)
    T         transfer of a boundary tensor from rank to rank
    H         of the exchange that an overlapped pair could hide, the share that it does, 0 to 1

All are costs of one P-th of the model, P being the number of ranks, in any one unit. I and W are as long
as F, and C and T nothing, unless given.
"""

import math
from dataclasses import dataclass

from moe_runtime.errors import ConfigError
from moe_runtime.planner.costs import Costs, StageCosts

KEYS = ("F", "B", "I", "W", "C", "CB", "T", "H")
_MOST_RATIO = 1e6
LEAST, MOST = 1e-9, 1e9  # far beyond use, and sums and ratios stay numbers
DEFAULT = "F=1,I=1,W=1,C=0"


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Costs that no schedule has been chosen for yet.

    Args:
        model: of one P-th of the model.
        transfer, hidden: as in `Costs`.
        unit: "s" for measured ones, else "".
    """

    model: StageCosts
    transfer: float = 0.0
    hidden: float = 1.0
    unit: str = ""

    def of(self, num_ranks: int, num_stages: int) -> Costs:
        """The costs of a schedule's stages, the model cut evenly."""
        return Costs.split(self.model, num_ranks, num_stages, self.transfer, self.hidden)


def read_costs(text: str, where: str = "--costs") -> ModelCosts:
    """The costs written in `text`.

    Args:
        where: begins the message of an error.

    Raises:
        ConfigError: an unknown or repeated key, no such number, or a B that is not I + W.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        key, number = _read_part(part.strip(), where)
        if key in given:
            raise ConfigError(f"{where}: expected each key once, got {key} twice; leave one out")
        given[key] = number
    if given.get("H", 0.0) > 1:
        raise ConfigError(f"{where}: H: expected a share, 0 to 1, got {given['H']:g}; 1 hides all it could")
    forward = given.get("F", 1.0)
    input_grad, weight_grad = _backward(given, forward, where)
    if forward + input_grad + weight_grad == 0:
        raise ConfigError(f"{where}: expected F, I or W above 0, got none; a step would take no time")
    times = [value for key, value in given.items() if key != "H" and value > 0]
    if times and max(times) > _MOST_RATIO * min(times):
        got = f"{min(times):g} and {max(times):g}"
        raise ConfigError(f"{where}: expected costs within {_MOST_RATIO:g} of each other, got {got}; use 0")
    exchange = given.get("C", 0.0)
    model = StageCosts(forward, input_grad, weight_grad, exchange, given.get("CB", exchange))
    return ModelCosts(model, given.get("T", 0.0), given.get("H", 1.0))


def _read_part(part: str, where: str) -> tuple[str, float]:
    key, _, number = part.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if key not in KEYS:
        keys = ", ".join(KEYS)
        raise ConfigError(f"{where}: expected KEY=NUMBER with a key of {keys}, got {part!r}; write F=1,B=2")
    if not (value == 0 or LEAST <= value <= MOST):  # as NaN is not either
        expected = f"expected 0 or a number from {LEAST:g} to {MOST:g}"
        raise ConfigError(f"{where}: {key}: {expected}, got {number!r}; write {key}=1")
    return key, value


def _backward(given: dict[str, float], forward: float, where: str) -> tuple[float, float]:
    """Costs of I and W."""
    if "B" not in given:
        return given.get("I", forward), given.get("W", forward)
    whole = given["B"]
    match "I" in given, "W" in given:
        case False, False:
            return whole / 2, whole / 2
        case True, False:
            parts = given["I"], whole - given["I"]
        case False, True:
            parts = whole - given["W"], given["W"]
        case _:
            parts = given["I"], given["W"]
    if min(parts) < 0 or not math.isclose(sum(parts), whole, rel_tol=1e-6):
        names = " and ".join(f"{key}={given[key]:g}" for key in ("I", "W") if key in given)
        raise ConfigError(f"{where}: expected B = I + W, got B={whole:g} with {names}; leave B out")
    return parts
