"""The rules of a run, from its config: what each built-in alert watches, and what it advises.

The three of routing tell what the routing bias does not mend. A young router is uneven, and experts without
tokens are common in its first hundred steps; their biases then rise by gamma a step and bring them back. A
rule on load alone would cry all that time, so these ask for more: an expert without tokens *though its bias
is not above its layer's mean*, an overloaded one *though its bias is not below it*, over many steps together.
And where the bias pushes but nothing gives way, biases end up further apart than affinities can be, which lie
between 0 and 1.
"""

import difflib

from moe_runtime.config.alerts import BUILT_IN, AlertRule
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.alerts import Rule
from moe_runtime.metrics.record import METRICS, metric_of

_METRICS = {
    "dead_expert": "routing/starved_steps/max",
    "violation": "routing/unchecked_violation/max",
    "bias_runaway": "routing/bias_range/max",
    "spike": "spike_z",
    "saturation": "fp8/*/saturation",
    "underflow": "fp8/*/underflow",
    "fp8_error": "fp8_error",
    "straggler": "straggler_ratio",
    "nonfinite": "nonfinite",
}
_ADVICE = {
    "dead_expert": "they learn nothing and the bias does not bring them back: see the heatmap of the report; "
    "raise recipe.bias_gamma, or go back to a checkpoint from before",
    "violation": "the load of these layers is not being evened out: raise recipe.bias_gamma or "
    "recipe.balance_alpha, and look at routing/logit_rms",
    "bias_runaway": "the bias decides alone which experts are used: lower recipe.bias_gamma, or set "
    "recipe.bias_until_tokens",
    "spike": "look at the data of this step; guard.spike_action=roll_back passes over such data",
    "saturation": "scales are too small for their values: look at fp8/*/amax, and set fp8.keep_high or "
    "precision=bf16",
    "underflow": "values within one tile differ too much: look at fp8/*/amax, and set fp8.keep_high",
    "fp8_error": "products in FP8 are not what they should be: set another fp8.backend, or precision=bf16",
    "straggler": "one machine is slow: see the straggler events, and take it out if it stays so",
    "nonfinite": "see the skipped event for parameter and rank; lower optim.peak_lr if it comes again",
}
_REACHABLE = 0.9  # of the largest violation there can be: a threshold beyond that would never be passed


def rules_of(config: RunConfig) -> tuple[Rule, ...]:
    """Every rule that is on.

    Raises:
        ConfigError: a custom alert is on a number that no record has.
    """
    alerts = config.alerts
    built_in = [(name, getattr(alerts, name)) for name in BUILT_IN]
    rules = [_built_in(name, rule, config.model) for name, rule in built_in if rule.threshold is not None]
    for place, custom in enumerate(alerts.custom):
        _check_metric(custom.metric, f"alerts.custom.{place}.metric")
        limit = custom.below if custom.above is None else custom.above
        assert limit is not None, "a custom alert has one threshold"
        is_floor = custom.above is None
        rules.append(Rule(custom.name, custom.metric, limit, is_floor, custom.patience, custom.action))
    return tuple(rules)


def _built_in(name: str, rule: AlertRule, model: ModelConfig) -> Rule:
    limit = rule.threshold
    assert limit is not None, "a rule that is off"
    if name == "violation":
        limit = min(limit, _REACHABLE * (model.num_experts / model.top_k - 1.0))
    return Rule(name, _METRICS[name], limit, False, rule.patience, rule.action, _ADVICE[name])


def _check_metric(metric: str, key: str) -> None:
    """A name that no record has would be an alert that cannot come."""
    described = metric_of(metric)
    if described is not None and described.unit not in ("name", "truth value"):
        return
    if described is not None:
        raise ConfigError(f"{key}: expected a number of a record, got {metric}, a {described.unit}")
    close = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"{key}: expected a number of a record, as docs/metrics.md lists them, got {metric!r}{hint}"
    )
