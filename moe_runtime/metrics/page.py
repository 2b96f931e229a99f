"""docs/metrics.md, made of the tables in `record.py`, so that both say the same."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from moe_runtime.errors import ConfigError
from moe_runtime.metrics.record import GROUPS, KEYS, METRICS, Metric, metric_of

_HEAD = """# Metrics

Every step of a run is one line of `metrics.jsonl` in its run folder: a JSON object with the numbers below.
W&B, TensorBoard, the report, the console and the alerts read the same record. This page is made of the tables
in `moe_runtime/metrics/record.py` by `moe-runtime metrics describe --markdown`; a test holds both equal.

How to read it:

- `routing/violation/max` stands in the record as `{"routing": {"violation": {"max": ...}}}`; a `*` stands for
  a name that depends on the run: a layer's prefix such as `layers.3` or `mtp.0.block`, a validation set, a
  class of parameters.
- What was not measured is absent, never 0. What was measured and is not finite is `null`.
- How many keys a record has does not depend on the size of the model; only `layers/*` does, which goes to
  `metrics.jsonl` (every `metrics.layers_every` steps) and not to W&B or TensorBoard.
- On a GPU the host's clock does not tell what the device waits for: bubbles, exposed and hidden communication
  and stragglers are measured on CPUs alone.
- No token is ever dropped here, so there is no drop rate: experts take what comes, in rounds if it must be
  (`layout.overflow`).
- The load of every single expert over time is in `expert_load.jsonl`: a line every `metrics.heatmap_every`
  steps, thinned out so that a run of any length has at most 1,000;
  `moe_runtime.metrics.heatmap.read_heatmap` reads it.
"""


def page() -> str:
    """The page in Markdown."""
    parts = [_HEAD]
    for title, group in GROUPS.items():
        parts.append(f"\n## {title}\n\n| key | definition | unit | measured in; after |\n|---|---|---|---|\n")
        parts += [
            f"| `{path}` | {_cell(metric.definition)} | {metric.unit} | {_cell(metric.source)} |\n"
            for path, metric in _rows(group)
        ]
    return "".join(parts)


def described(keys: Iterable[str]) -> dict[str, Metric]:
    """The metrics of these keys, and of keys that begin so; all of them where there are none.

    Raises:
        ConfigError: a key is of no metric; says which one was meant.
    """
    found: dict[str, Metric] = {}
    for key in keys:
        exact = metric_of(key)
        group = {key: exact} if exact else {path: METRICS[path] for path in METRICS if _begins(path, key)}
        if not group:
            near = get_close_matches(key, METRICS, n=1)
            meant = f"did you mean {near[0]}?" if near else "`moe-runtime metrics describe` shows all"
            raise ConfigError(f"expected the key of a metric, got {key}; {meant}")
        found |= group
    return found or METRICS


def text_of(metrics: Mapping[str, Metric]) -> str:
    """One metric a line: key, unit, definition, source."""
    return "\n".join(
        f"{path} [{metric.unit}]: {metric.definition} ({metric.source})" for path, metric in metrics.items()
    )


def _begins(path: str, key: str) -> bool:
    return path.startswith(key.rstrip("/") + "/") if "/" in key or key in KEYS else False


def _rows(group: Mapping[str, Metric]) -> Iterator[tuple[str, Metric]]:
    """The rows of a table; the three places of a spread are one row."""
    for path, metric in group.items():
        if path.endswith("/min") and path.startswith("routing/"):
            name = path.removesuffix("min")
            words = metric.definition.removeprefix("smallest over the MoE layers: ")
            yield f"{name}min`, `p50`, `max", metric._replace(definition=f"over the MoE layers: {words}")
        elif not path.startswith("routing/"):
            yield path, metric


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
