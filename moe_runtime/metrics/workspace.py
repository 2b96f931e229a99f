"""The panels as a workspace of W&B, built here and without a network; a server is needed to save it alone.

A panel of several keys, or of a pattern, becomes one line plot; patterns become regular expressions, by which
W&B finds the validation sets and classes of parameters that a run happens to have. Each section begins with a
panel of text that says how to read the others.
"""

import hashlib
import json
import re
from collections.abc import Collection
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.metrics.panel import LEARNING, PERFORMANCE, ROUTING, SECTIONS, Panel
from moe_runtime.metrics.panels import panels_of

NAME = "Mixture of experts"
_OPEN = (LEARNING, ROUTING, PERFORMANCE)


def build_workspace(entity: str, project: str, emitted: Collection[str] | None = None) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`.

    Args:
        entity, project: of W&B, where it is to be saved.
        emitted: flat keys of a run; panels of which it has none are left out. None: all panels.

    Raises:
        ConfigError: the package is missing.
    """
    api = _workspaces()
    sections = [
        api.Section(name=name, panels=panels, is_open=name in _OPEN)
        for name in SECTIONS
        if (panels := _section(name, emitted))
    ]
    return api.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def save(workspace: Any, update: str | None = None) -> str:
    """Save a workspace to W&B's server; gives its URL.

    Args:
        update: URL of one that was saved before: its sections are replaced, all else in it stays.

    Raises:
        ConfigError: the server cannot be reached, or refuses.
    """
    try:
        if update is None:
            return str(workspace.save().url)
        older = _workspaces().Workspace.from_url(update)
        older.sections = workspace.sections
        return str(older.save().url)
    except Exception as error:  # W&B's, requests', or plain ones about what the server answered
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"dashboard: W&B did not take it: {reason}; --json FILE needs no server") from error


def default_entity() -> str:
    """The user or team that the key in use belongs to.

    Raises:
        ConfigError: there is no key, or no server.
    """
    import wandb

    try:
        found = wandb.Api().default_entity
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"dashboard: W&B says nobody's name: {reason}; give --entity NAME") from error
    if not found:
        raise ConfigError("--entity: expected a user or team of W&B, got none, and the key has none either")
    return str(found)


def to_json(workspace: Any) -> str:
    """The workspace as W&B's server gets it; equal panels give equal text."""
    # The package has no public way to show what it sends; its version is bounded in pyproject.toml.
    spec = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    return json.dumps(_with_plain_ids(spec, "workspace"), indent=1)


def _section(name: str, emitted: Collection[str] | None) -> list[Any]:
    shown = [panel for panel in panels_of(name) if emitted is None or panel.lines(emitted)]
    return [_how_to_read(shown), *map(_panel, shown)] if shown else []


def _how_to_read(panels: list[Panel]) -> Any:
    from wandb_workspaces.reports.v2 import MarkdownPanel

    return MarkdownPanel(markdown="\n".join(f"- **{panel.title}**: {panel.hint}" for panel in panels))


def _panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2

    if panel.kind == "image":
        return v2.MediaBrowser(title=panel.title, media_keys=list(panel.keys))
    if panel.kind == "table":
        return v2.WeavePanelSummaryTable(table_name=panel.keys[0])
    axis = panel.unit or None
    about: dict[str, Any] = {"title": panel.title, "x": "Step", "title_y": axis, "log_y": panel.log or None}
    if any("*" in key for key in panel.keys):
        return v2.LinePlot(metric_regex=regex_of(panel.keys), **about)
    return v2.LinePlot(y=list(panel.keys), **about)


def regex_of(keys: Collection[str]) -> str:
    """The flat keys that are meant by any of these patterns."""
    parts = [re.escape(key).replace(r"\*", "[^/]+") for key in keys]
    return f"^({'|'.join(parts)})$"


def _workspaces() -> Any:
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        text = f"wandb_workspaces: expected the package, got none ({error}); pip install wandb-workspaces"
        raise ConfigError(text) from None
    return workspaces


def _with_plain_ids(value: Any, path: str) -> Any:
    """The ids, which W&B's package draws at random, made from where they stand."""
    if isinstance(value, dict):
        return {
            key: hashlib.sha256(path.encode()).hexdigest()[:11]
            if key == "__id__" and part
            else _with_plain_ids(part, f"{path}/{key}")
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [_with_plain_ids(part, f"{path}/{number}") for number, part in enumerate(value)]
    return value
