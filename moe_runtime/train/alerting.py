"""Carries out what alerts call for: tells them, and says on every rank alike what the loop is to do.

Every rank folds the same records, but some numbers of a record are a rank's own clock. So rank 0's verdict
counts: it travels with the wish to stop, in the reduction that every step has anyway.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.errors import AlertStop
from moe_runtime.metrics.alerts import Alert, Alerts, Rule
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.peers import Peers

# A number of steps -> layer -> experts without tokens for longer, of the layers that a rank tells of.
Starved = Callable[[float], Mapping[str, list[int]]]


@dataclass(frozen=True)
class Verdict:
    """What follows from a step, alike on every rank.

    Args:
        stops: some rank was asked to stop.
        raised: rules whose alert was raised.
        alerts: those alerts, as this rank saw them.
    """

    stops: bool
    raised: tuple[Rule, ...] = ()
    alerts: Mapping[str, Alert] = field(default_factory=dict)

    def calls_for(self, action: str) -> bool:
        """True if an alert does."""
        return any(action in rule.actions for rule in self.raised)

    def end(self, step: int) -> None:
        """End the run if an alert says so.

        Raises:
            AlertStop: on every rank alike.
        """
        rule = next((rule for rule in self.raised if "stop" in rule.actions), None)
        if rule is None:
            return
        said = self.alerts[rule.name].message if rule.name in self.alerts else f"alert {rule.name}"
        raise AlertStop(
            f"step {step}: {said}; the run ends, as the alert's action says: the same command continues from "
            "the last checkpoint"
        )


class Alarm:
    """Judges steps by their records; made and used on every rank alike.

    Args:
        alerts: rules and what they remember.
        peers: all ranks.
        recorder: hears of alerts.
        starved: which experts of this rank's layers are without tokens.
    """

    def __init__(self, alerts: Alerts, peers: Peers, recorder: Recorder, starved: Starved) -> None:
        self._alerts, self._peers, self._recorder, self._starved = alerts, peers, recorder, starved

    def judge(self, record: Mapping[str, Any], stop_wanted: bool) -> Verdict:
        """Take a step into account, and tell what it raises or ends; a collective call.

        Args:
            stop_wanted: this rank was asked to stop.
        """
        rules = self._alerts.rules
        raised, over = self._alerts.update(record)
        own = {alert.rule.name: alert for alert in raised}
        flags = self._peers.any_of(
            [stop_wanted, *(self._peers.is_first and rule.name in own for rule in rules)]
        )
        called = tuple(rule for rule, flag in zip(rules, flags[1:], strict=True) if flag)
        self._tell(own, called)
        for rule in over:
            message = f"alert {rule.name} is over: {rule.metric} is back"
            self._recorder.tell("alert_over", record["step"], message, alert=rule.name, metric=rule.metric)
        return Verdict(flags[0], called, own)

    def _tell(self, own: Mapping[str, Alert], called: tuple[Rule, ...]) -> None:
        """Tell what was raised; on ranks that are silent this only takes part."""
        for rule in called:
            more = self._experts(rule.limit) if rule.name == "dead_expert" else {}
            alert = own.get(rule.name)
            if alert is None:  # this rank's own clock says otherwise, and it is silent anyway
                continue
            names = "; ".join(f"{layer}: experts {experts}" for layer, experts in more.items())
            message = f"{alert.message} ({names})" if names else alert.message
            fields = alert.fields() | ({"experts": more} if more else {})
            self._recorder.alert(alert.step, message, rule.actions, fields)

    def _experts(self, limit: float) -> dict[str, list[int]]:
        said = self._peers.gather_json(dict(self._starved(limit)))
        return {layer: experts for part in said for layer, experts in part.items()}
