"""Which curves stand in which picture, what each is called there, and the picture told in words."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moe_runtime.metrics.panel import Panel
from moe_runtime.metrics.panels import PANELS
from moe_runtime.metrics.report.folded import Folded, Stats
from moe_runtime.metrics.report.shown import exact, rounded

Place = tuple[int, float]


@dataclass(frozen=True)
class Numbers:
    """A row of the table under a picture; a cell is (text to read, exact text, step)."""

    key: str
    count: int
    first: tuple[str, str, int]
    last: tuple[str, str, int]
    least: tuple[str, str, int] | None
    greatest: tuple[str, str, int] | None
    num_bad: int
    first_bad: int | None


def panel_id(panel: Panel) -> str:
    """A word for ids of the page."""
    letters = "".join(char if char.isalnum() else "-" for char in panel.title.lower())
    return "-".join(part for part in letters.split("-") if part)


def line_panels() -> list[Panel]:
    """The panels that show numbers over steps, in order."""
    return [panel for panel in PANELS if panel.kind == "lines"]


def labels_of(keys: Sequence[str]) -> list[str]:
    """Short names: what the paths of one picture have in common at their ends is left out.

    `routing/violation/min` and `routing/violation/max` are `min` and `max`.
    """
    paths = [key.split("/") for key in keys if "/" in key]
    if len(paths) < 2:
        return list(keys)
    head = _common(paths)
    tail = _common([path[head:][::-1] for path in paths])
    names = {"/".join(path): " ".join(path[head : len(path) - tail]) for path in paths}
    return [names.get(key) or key for key in keys]


def numbers_of(keys: Sequence[str], curves: Mapping[str, Folded]) -> list[Numbers]:
    """The table of a picture."""
    return [_numbers(key, curves[key].stats) for key in keys]


def in_words(panel: Panel, keys: Sequence[str], curves: Mapping[str, Folded]) -> str:
    """What a person hears who cannot see the picture."""
    said = []
    for key, label in zip(keys, labels_of(keys), strict=True):
        stats = curves[key].stats
        if stats.first is None or stats.last is None or stats.least is None or stats.greatest is None:
            said.append(f"{label}: no finite value")
            continue
        said.append(
            f"{label} from {rounded(stats.first[1])} at step {stats.first[0]:,} "
            f"to {rounded(stats.last[1])} at step {stats.last[0]:,}, "
            f"least {rounded(stats.least[1])}, greatest {rounded(stats.greatest[1])}"
        )
    unit = f" in {panel.unit}" if panel.unit else ""
    return f"{panel.title}{unit} over steps. " + "; ".join(said[:6]) + (" …" if len(said) > 6 else ".")


def unseen(emitted: Collection[str]) -> list[str]:
    """Keys of a run that no picture shows, in order."""
    shown = {key for panel in line_panels() for key in panel.lines(emitted)}
    return sorted(set(emitted) - shown - {"step"})


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many leading parts all have in common; never all parts of any."""
    shortest = min(map(len, parts)) - 1
    return next((n for n in range(shortest) if len({part[n] for part in parts}) > 1), max(0, shortest))


def _numbers(key: str, stats: Stats) -> Numbers:
    assert stats.first is not None and stats.last is not None, f"{key}: a curve without a point"
    first, last = _cell(stats.first), _cell(stats.last)
    least = _cell(stats.least) if stats.least else None
    greatest = _cell(stats.greatest) if stats.greatest else None
    return Numbers(key, stats.count, first, last, least, greatest, stats.num_bad, stats.first_bad)


def _cell(place: Place) -> tuple[str, str, int]:
    return rounded(place[1]), exact(place[1]), place[0]
