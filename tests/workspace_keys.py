"""Which keys a workspace of W&B reads, as its server would find them in what it is sent."""

from typing import Any

from moe_runtime.metrics.workspace import regex_of


def shown_keys(made: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Regular expressions, one for each number or pattern of numbers; and keys of pictures and tables."""
    lines: set[str] = set()
    media: set[str] = set()
    for section in made["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            lines |= {regex_of([key]) for key in config.get("metrics") or ()}
            if config.get("metricRegex"):
                inner = config["metricRegex"].removeprefix("^(").removesuffix(")$")
                lines |= {f"^({part})$" for part in inner.split("|")}
            media |= set(config.get("mediaKeys") or ())
            if panel["viewType"] == "Weave":
                media.add(_table(config))
    return lines, media


def _table(config: Any) -> str:
    """The name of the table that a panel of the kind `Weave` takes from the summaries of runs."""
    if isinstance(config, dict):
        if config.get("name") == "pick" and "key" in config.get("inputs", {}):
            return str(config["inputs"]["key"]["val"])
        found = [name for value in config.values() if (name := _table(value))]
        return found[0] if found else ""
    return ""
