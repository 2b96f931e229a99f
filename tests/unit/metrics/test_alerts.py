"""When alerts are raised and over: a fold over records that a resume does not disturb."""

import json
import math
from typing import Any

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.alert_rules import rules_of
from moe_runtime.metrics.alerts import KEPT, Alert, Alerts, Rule

HIGH = Rule("high", "grad_norm", 2.0, patience=3)
Record = dict[str, Any]


def fold(alerts: Alerts, values: list[float | None], first: int = 1) -> tuple[list[Alert], list[int]]:
    """Alerts that records of these gradient norms raise, and the steps at which one is over."""
    raised, over = [], []
    for step, value in enumerate(values, start=first):
        record = {"step": step} | ({} if value is None else {"grad_norm": value})
        new, ended = alerts.update(record)
        raised += new
        over += [step] * len(ended)
    return raised, over


def test_an_alert_needs_as_many_in_a_row_as_its_patience_says() -> None:
    assert fold(Alerts((HIGH,)), [3.0, 3.0, 2.0] * 20) == ([], [])
    (alert,), _ = fold(Alerts((HIGH,)), [1.0, 3.0, 4.0, 5.0, 6.0])
    assert (alert.step, alert.value) == (4, 5.0)
    assert alert.last == ((1, 1.0), (2, 3.0), (3, 4.0), (4, 5.0))


def test_it_is_told_once_and_again_only_after_it_was_over() -> None:
    raised, over = fold(Alerts((HIGH,)), [3.0] * 50)
    assert [alert.step for alert in raised] == [3] and over == []
    flutter = [3.0] * 3 + [1.0, 1.0, 3.0] * 10
    assert len(fold(Alerts((HIGH,)), flutter)[0]) == 1, "what flutters about the limit is told once"
    raised, over = fold(Alerts((HIGH,)), [3.0] * 3 + [1.0] * 3 + [3.0] * 3)
    assert [alert.step for alert in raised] == [3, 9] and over == [6]


def test_steps_that_do_not_measure_neither_count_nor_break_a_row() -> None:
    (alert,), _ = fold(Alerts((HIGH,)), [3.0, None, None, 3.0, None, 3.0])
    assert alert.step == 6 and [step for step, _ in alert.last] == [1, 4, 6]


def test_what_is_not_finite_is_beyond_every_limit_and_null_in_the_event() -> None:
    floor = Rule("floor", "grad_norm", 0.0, is_floor=True)
    for rule in (Rule("cap", "grad_norm", 1e9), floor):
        (alert,), _ = fold(Alerts((rule,)), [1.0, math.nan])
        event = alert.fields()
        assert event["value"] is None and event["last"] == [[1, 1.0], [2, None]]
        json.dumps(event, allow_nan=False)


def test_an_event_has_the_last_twenty_values() -> None:
    (alert,), _ = fold(Alerts((HIGH,)), [1.0] * 30 + [3.0] * 3)
    last = alert.fields()["last"]
    assert len(last) == KEPT == 20 and last[0] == [14, 1.0] and last[-1] == [33, 3.0]
    assert alert.message == "alert high: grad_norm: expected at most 2, got 3, 3 times in a row"


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 9])
def test_a_resumed_run_goes_on_alike(cut: int) -> None:
    values = [1.0, 3.0, math.nan, 4.0, 5.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0]
    whole = fold(Alerts((HIGH,)), values)
    before, after = Alerts((HIGH,)), Alerts((HIGH,))
    first = fold(before, values[:cut])
    after.restore(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    second = fold(after, values[cut:], cut + 1)
    events = [alert.fields() for alert in first[0] + second[0]]
    assert events == [alert.fields() for alert in whole[0]] and first[1] + second[1] == whole[1]


def test_a_rule_of_which_a_checkpoint_knows_nothing_begins_anew() -> None:
    alerts = Alerts((HIGH,))
    fold(alerts, [3.0, 3.0])
    alerts.restore({"another": {}})
    assert fold(alerts, [3.0], 3) == ([], [])


def test_a_star_takes_the_worst_and_names_it() -> None:
    rule = Rule("cut", "fp8/*/saturation", 0.1)
    record = {"step": 5, "fp8": {"input": {"saturation": 0.2}, "weight": {"saturation": 0.5}, "gradient": {}}}
    (alert,), _ = Alerts((rule,)).update(record)
    assert alert.value == 0.5 and alert.where == ("weight", "input")
    assert "fp8/*/saturation (weight, input): expected at most 0.1, got 0.5" in alert.message
    low = Rule("low", "fp8/*/saturation", 0.3, is_floor=True)
    assert Alerts((low,)).update(record)[0][0].value == 0.2


def test_a_number_over_layers_names_the_layers_where_a_record_has_them() -> None:
    rule = Rule("uneven", "routing/violation/max", 1.0)
    record: Record = {"step": 1, "routing": {"violation": {"min": 0.1, "p50": 0.5, "max": 3.0}}}
    assert Alerts((rule,)).update(record)[0][0].where == ()
    layers = {f"layers.{n}": {"violation": value} for n, value in enumerate((0.5, 2.0, 3.0))}
    assert Alerts((rule,)).update(record | {"layers": layers})[0][0].where == ("layers.2", "layers.1")


def test_a_straggler_is_named() -> None:
    record = {"step": 9, "straggler_ratio": 3.0, "straggler_rank": 2}
    (alert,) = Alerts((Rule("straggler", "straggler_ratio", 1.5),)).update(record)[0]
    assert alert.where == ("rank 2",) and "straggler_ratio (rank 2): expected at most 1.5" in alert.message


def rules(*overrides: str) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules_of(load_config("configs/run/quickstart.yaml", overrides))}


def test_every_kind_can_be_set_and_turned_off() -> None:
    usual = rules()
    assert set(usual) >= {"dead_expert", "violation", "bias_runaway", "spike", "saturation", "straggler"}
    assert {rule.actions for rule in usual.values()} == {("log",)}
    assert "spike" not in rules("alerts.spike.threshold=null")
    changed = rules("alerts.spike.action=[wandb, checkpoint]", "alerts.spike.threshold=7")["spike"]
    assert (changed.actions, changed.limit) == (("wandb", "checkpoint"), 7.0)
    assert rules("alerts.dead_expert.action=stop")["dead_expert"].actions == ("stop",)


def test_no_threshold_is_beyond_what_can_be() -> None:
    """Of 4 experts of which a token uses 2, none can have more than twice a fair share."""
    few = ("model.num_experts=4", "model.num_groups=1", "model.num_groups_kept=1")
    assert rules(*few, "alerts.violation.threshold=5")["violation"].limit == pytest.approx(0.9)
    assert rules()["violation"].limit == 1.0


def test_an_alert_of_ones_own_is_on_any_number_of_a_record() -> None:
    custom = "alerts.custom=[{name: slow, metric: tokens_per_s, below: 100, patience: 5, action: stop}]"
    rule = rules(custom)["slow"]
    assert (rule.metric, rule.limit, rule.is_floor, rule.patience) == ("tokens_per_s", 100.0, True, 5)
    assert rule.actions == ("stop",)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "alerts.custom=[{name: a, metric: grad_nrom, above: 1}]",
            r"alerts.custom.0.metric: .*'grad_nrom'; did you mean grad_norm\?",
        ),
        ("alerts.custom=[{name: a, metric: worst_layer, above: 1}]", "got worst_layer, a name"),
        ("alerts.custom=[{name: a, metric: loss, above: 1, below: 0}]", "either above or below"),
        ("alerts.custom=[{name: a, metric: loss}]", "either above or below"),
        ("alerts.custom=[{name: spike, metric: loss, above: 1}]", "two alerts are named spike"),
        ("alerts.spike.action=[roll_back, stop]", "exclude each other"),
        ("alerts.spike.action=[roll_back, checkpoint]", "exclude each other"),
        ("alerts.spike.action=explode", "alerts.spike.action.0: expected one of 'log', .*got text 'explode'"),
        ("alerts.spike.action=[]", "alerts.spike.action"),
        ("alerts.spike.treshold=3", "did you mean"),
        ("alerts.dead_expert={threshold: null, action: stop}", "no effect while threshold is null"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        rules(override)
    assert "\n" not in str(caught.value)
