"""What a record says of routing: as many keys for a model of any depth, and few digits."""

import json
from typing import Any

import pytest

from moe_runtime.metrics.line import paths, to_line
from moe_runtime.metrics.record import LAYER_KEYS, SPREAD
from moe_runtime.train.meters.routing import Layers, detail, summary


def layers(count: int, **changes: Any) -> Layers:
    values = dict.fromkeys((*LAYER_KEYS, "rank_load_ratio"), 1 / 3)
    return {f"layers.{number}": values | changes | {"violation": 1 / (1 + number)} for number in range(count)}


def record(found: Layers, with_layers: bool) -> dict[str, Any]:
    least = {"step": 1, "tokens": 1, "loss": 1.0}
    return to_line({**least, **summary(found), "layers": detail(found) if with_layers else None})


def test_a_model_of_61_layers_has_as_many_keys_as_one_of_4() -> None:
    few, many = (dict(paths(record(layers(count), with_layers=False))) for count in (4, 61))
    assert few.keys() == many.keys() and len(few) < 60
    assert {f"routing/{name}/max" for name in SPREAD} <= few.keys()
    assert record(layers(4), True).keys() == record(layers(61), True).keys()


def test_the_spread_over_layers_is_that_of_their_values() -> None:
    found = summary(layers(5))
    assert found["routing"]["violation"] == {"min": 0.2, "p50": 0.3333333, "max": 1.0}
    assert found["worst_layer"] == "layers.0"
    assert found["max_violation"] == pytest.approx(sum(1 / (1 + number) for number in range(5)) / 5)


def test_what_no_layer_measures_has_no_key_and_a_model_without_experts_no_routing() -> None:
    found = summary(layers(3, top_k_margin=None))
    assert "top_k_margin" not in to_line({"step": 1, "tokens": 1, "loss": 1.0, **found})["routing"]
    assert summary({}) == {} and record({}, True).keys() == {"step", "tokens", "loss"}


def test_layers_are_written_with_seven_digits() -> None:
    line = json.dumps(detail(layers(58)))
    assert "0.3333333," in line and "0.33333333" not in line
    assert len(line) < 58 * 30 * len(LAYER_KEYS)
