"""The figures at the top of the report: each with its exact value, where it comes from, and a way to more."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config.derive import count_parameters
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.report.folded import Folded
from moe_runtime.metrics.report.history import History
from moe_runtime.metrics.report.shown import as_text, exact, rounded, visible


@dataclass(frozen=True)
class Fact:
    """One figure.

    Args:
        value: for reading; `exact` as it was recorded, empty if there is no more to it.
        note: where it comes from.
        link: id of the part of the page that has more.
    """

    label: str
    value: str
    exact: str = ""
    note: str = ""
    link: str = ""


def config_of(path: Path) -> RunConfig | None:
    """A run's configuration; None if there is none, or one that this version does not know."""
    try:
        return load_config(path.resolve()) if path.is_file() else None
    except (ConfigError, ValueError, OSError):
        return None


def facts_of(
    config: RunConfig | None, history: History, events: Sequence[dict[str, Any]], dead: tuple[int, int] | None
) -> dict[str, list[Fact]]:
    """The facts by group, those that were measured or are known alone.

    Args:
        dead: how many experts are dead, and at which step they were counted; None: they were not.
    """
    groups = {
        "Progress": _progress(config, history, events),
        "Quality": _quality(history, events),
        "Speed": _speed(history),
        "Routing": _routing(history, dead),
        "Checkpoints": _checkpoints(events),
        "Trouble": _trouble(history, events),
        "Model": _model(config),
        "Layout": _layout(config),
    }
    return {name: found for name, facts in groups.items() if (found := [*facts])}


def _progress(config: RunConfig | None, history: History, events: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    if history.last_step:
        of = f" of {config.train.total_steps:,}" if config and config.train.total_steps else ""
        yield Fact("steps", f"{history.last_step:,}{of}", exact(history.last_step), link="section-learning")
    yield from _last(history, "tokens", "tokens", "section-learning")
    yield from _last(history, "epoch", "epochs", "section-learning")
    times = [as_text(event["time"]) for event in events if "time" in event]
    if times:
        yield Fact("first event", times[0][:19].replace("T", " "), times[0], "UTC", "section-events")
        yield Fact("last event", times[-1][:19].replace("T", " "), times[-1], "UTC", "section-events")


def _quality(history: History, events: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    yield from _last(history, "loss", "loss", "panel-loss")
    yield from _best(history, "val_loss", "validation loss", "panel-loss")
    yield from _best(history, "val_bpb", "bits per byte", "panel-validation-bits-per-byte")
    for event in events:
        order1 = event.get("order1_bpb") if event["kind"] == "finished" else None
        if isinstance(order1, float):
            note = "of a table of byte pairs, the least that a model must beat"
            yield Fact("bits per byte, order 1", rounded(order1), exact(order1), note)
            return


def _speed(history: History) -> Iterator[Fact]:
    yield from _last(history, "tokens_per_s", "tokens/s", "panel-speed")
    yield from _last(history, "step_s_p50", "step, median, s", "panel-time-of-a-step")
    yield from _last(history, "step_s", "step, s", "panel-time-of-a-step")
    yield from _last(history, "mfu", "model FLOPs utilisation", "panel-model-flops-utilisation")
    yield from _last(history, "bubble_fraction", "pipeline bubble", "panel-pipeline-bubble")
    exposed = "panel-exposed-and-hidden-communication"
    yield from _last(history, "exposed_comm_fraction", "exposed communication", exposed)
    yield from _last(history, "hidden_comm_fraction", "hidden communication", exposed)
    yield from _most(history, "memory_peak_gb", "peak memory, GB", "panel-peak-memory-of-the-worst-rank")


def _routing(history: History, dead: tuple[int, int] | None) -> Iterator[Fact]:
    yield from _last(history, "max_violation", "load violation", "panel-load-violation")
    if dead is not None:
        count, step = dead
        note = f"below 1% of a fair share at step {step:,}, the newest in expert_load.jsonl"
        yield Fact(f"dead experts at step {step:,}", str(count), str(count), note, "dead-experts")


def _checkpoints(events: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    """As the events tell them: records have of a checkpoint what is known when the next step ends."""
    written = [event for event in events if event["kind"] == "checkpoint" and type(event.get("step")) is int]
    if not written:
        return
    newest, count = written[-1], len(written)
    yield Fact("written", f"{count:,}", str(count), "events.jsonl", "section-events")
    yield Fact("newest, step", f"{newest['step']:,}", str(newest["step"]), "events.jsonl", "section-events")
    for key, label in (
        ("write_s", "newest, written in, s"),
        ("blocked_s", "newest, training stood still, s"),
    ):
        value = newest.get(key)
        if isinstance(value, int | float):
            yield Fact(label, rounded(value), exact(value), f"{key} in events.jsonl", "section-events")


def _trouble(history: History, events: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    counts: dict[str, Callable[[dict[str, Any]], bool]] = {
        "alerts": lambda event: event["kind"] == "alert",
        "spikes": lambda event: event["kind"] == "spike",
        "skipped steps": lambda event: event["kind"] == "skipped",
        "faults": lambda event: event["kind"] == "fault",
        "roll-backs": lambda event: event["kind"] == "roll_back",
        "restarts": lambda event: event["kind"] == "attempt" and (event.get("attempt") or 1) != 1,
        "warnings": lambda event: event["kind"] == "warning",
    }
    for name, matches in counts.items():
        count = sum(map(matches, events))
        if count:
            yield Fact(name, f"{count:,}", str(count), "events.jsonl", "section-events")
    bad = {key: curve.stats for key, curve in history.curves.items() if curve.stats.num_bad}
    for key, stats in list(bad.items())[:3]:
        note = f"first at step {stats.first_bad:,}"
        yield Fact(f"{visible(key, 80)} not finite", f"{stats.num_bad:,} steps", str(stats.num_bad), note)


def _model(config: RunConfig | None) -> Iterator[Fact]:
    if config is None:
        return
    counts, model = count_parameters(config.model), config.model
    yield Fact("parameters", _size(counts.total), str(counts.total))
    yield Fact("active for a token", _size(counts.active), str(counts.active))
    yield Fact("layers", f"{model.num_layers}, {model.num_dense_layers} of them dense")
    yield Fact(
        "experts", f"{model.num_experts}, {model.top_k} for a token, {model.num_shared_experts} shared"
    )
    yield Fact("precision", f"{config.precision}, moments {config.optim.moments}", link="section-config")


def _layout(config: RunConfig | None) -> Iterator[Fact]:
    if config is None:
        return
    layout, batch = config.layout, config.batch
    yield Fact("ranks", f"pp {layout.pp} × dp {layout.dp}, ep {layout.ep}", str(layout.pp * layout.dp))
    yield Fact("schedule", str(layout.schedule), link="section-config")
    yield Fact("batch", f"{batch.global_batch_size:,} sequences of {batch.seq_len:,} tokens")
    yield Fact(
        "data",
        visible(str(config.data.source or config.data.path or ", ".join(config.data.mixture)), 200),
        link="section-config",
    )


def _last(history: History, key: str, label: str, link: str) -> Iterator[Fact]:
    yield from _fact(history.curves, key, label, link, lambda curve: curve.stats.last, "last")


def _best(history: History, key: str, label: str, link: str) -> Iterator[Fact]:
    yield from _fact(history.curves, key, f"{label}, best", link, lambda curve: curve.stats.least, "least")


def _most(history: History, key: str, label: str, link: str) -> Iterator[Fact]:
    yield from _fact(history.curves, key, label, link, lambda curve: curve.stats.greatest, "greatest")


def _fact(
    curves: Mapping[str, Folded],
    key: str,
    label: str,
    link: str,
    choose: Callable[[Folded], tuple[int, float] | None],
    which: str,
) -> Iterator[Fact]:
    place = choose(curves[key]) if key in curves else None
    if place is not None:
        note = f"{key}, {which}, step {place[0]:,}"
        yield Fact(label, rounded(place[1]), exact(place[1]), note, link)


def _size(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
