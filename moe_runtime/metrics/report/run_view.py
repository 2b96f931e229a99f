"""Everything that the report shows of a run folder: the data of its pictures, and its texts.

One object serves a file that is written once and a page that follows the run: `look` reads what is new, the
rest tells what there is now. What is costly to make is made again only when its file has changed.
"""

from pathlib import Path
from typing import Any

from moe_runtime.metrics.files import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, TRACE_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE, Heatmap, read_heatmap
from moe_runtime.metrics.panel import Panel
from moe_runtime.metrics.report import image_figures
from moe_runtime.metrics.report.curves_of_panels import labels_of, line_panels, panel_id
from moe_runtime.metrics.report.history import History
from moe_runtime.metrics.report.journal import Journal, marks
from moe_runtime.metrics.report.line_figure import FEW_POINTS, Form, line_figure, look_of
from moe_runtime.metrics.report.load_frames import DeadExpert, dead_experts, frames_of
from moe_runtime.metrics.report.packing import numbers, pack_curves
from moe_runtime.metrics.report.pipeline import Pipeline, boxes, read_pipeline
from moe_runtime.metrics.report.summary import RunConfig, config_of

_STEP_KEY = "step"
_IMAGES = {  # what the data is called: the pictures made of it, by id, and the kind of each
    "load": {"load-by-expert": "load", "load-over-time": "loadTime"},
    "layers": {"layer-numbers": "layers"},
    "pipeline": {"pipeline-measured": "measured", "pipeline-ideal": "ideal"},
}
_HEAVY = ("load", "pipeline")  # images that change seldom, in the order of their words in a signature
_Stamp = tuple[int, int, int] | None


class RunView:
    """A run folder, read as far as it is written.

    Attributes:
        history, journal: metrics.jsonl and events.jsonl.
        heatmap: loads of experts; no times if there are none.
        pipeline: of the traced step; a sentence if the trace cannot be shown, None if there is none.
        config: None if there is none that this version knows.
        signature: of what the last look read; see `signature_of`.
        dead: experts that are dead at the last time, and how many more there are.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.history = History(run_dir / METRICS_FILE)
        self.journal = Journal(run_dir / EVENTS_FILE)
        self.heatmap: Heatmap = read_heatmap(run_dir / HEATMAP_FILE)
        self.pipeline: Pipeline | str | None = None
        self.config: RunConfig | None = None
        self.dead: tuple[list[DeadExpert], int] = ([], 0)
        self.signature = ""
        self._stamps: dict[str, _Stamp] = {}
        self._images: dict[str, Any] = {}

    def look(self) -> None:
        """Read what is new."""
        self.signature = signature_of(self.run_dir)  # first: what changes meanwhile is for the next look
        self.history.look()
        self.journal.look()
        if self._is_new(HEATMAP_FILE):
            self.heatmap = read_heatmap(self.run_dir / HEATMAP_FILE)
            self.dead = dead_experts(self.heatmap)
            self._images["load"] = _pack_load(self.heatmap)
        if self._is_new(TRACE_FILE):
            self.pipeline = read_pipeline(self.run_dir / TRACE_FILE)
            self._images["pipeline"] = _pack_pipeline(self.pipeline)
        if self._is_new(CONFIG_FILE):
            self.config = config_of(self.run_dir / CONFIG_FILE)

    def keys_by_panel(self) -> dict[str, list[str]]:
        """Keys of the curves of each picture that has any."""
        emitted = [key for key in self.history.curves if key != _STEP_KEY]
        found = {panel_id(panel): panel.lines(emitted) for panel in line_panels()}
        return {name: keys for name, keys in found.items() if keys}

    def data(self, known: str = "") -> dict[str, Any]:
        """What the page's script draws: numbers packed, pictures as Bokeh's JSON.

        Args:
            known: a signature; heavy images that have not changed since then are null.
        """
        layers = _pack_layers(self.history)
        images = {name: packed for name, packed in self._images.items() if packed}
        if layers:
            images["layers"] = layers
        words = zip(_HEAVY, known.split("-"), self.signature.split("-"), strict=False)
        unchanged = {name: None for name, old, new in words if old == new and name in images}
        return {
            **pack_curves(self.history.curves),
            "lastStep": self.history.last_step,
            "marks": marks(self.journal.lines),
            "fewPoints": FEW_POINTS,
            "plots": self._plots(images),
            "forms": self._forms(),
            **images,
            **unchanged,
        }

    def _plots(self, images: dict[str, Any]) -> dict[str, Any]:
        """By id: the kind of picture and its form; of curves, what they are called and look like."""
        keys_of = self.keys_by_panel()
        found: dict[str, Any] = {}
        for panel in line_panels():
            keys = keys_of.get(panel_id(panel))
            if keys:
                curves = [*zip(keys, labels_of(keys), look_of(keys), strict=True)]
                form = _name(self._form(panel, keys))
                found[panel_id(panel)] = {"kind": "lines", "form": form, "unit": panel.unit, "curves": curves}
        for image in images:
            found |= {name: {"kind": kind, "form": kind} for name, kind in _IMAGES[image].items()}
        return found

    def _forms(self) -> dict[str, Any]:
        """Bokeh's JSON of every form, by its name."""
        keys_of = self.keys_by_panel()
        forms = {
            self._form(panel, keys_of[panel_id(panel)])
            for panel in line_panels()
            if panel_id(panel) in keys_of
        }
        return {_name(form): line_figure(form) for form in sorted(forms)} | image_figures.forms()

    def _form(self, panel: Panel, keys: list[str]) -> Form:
        few = any(self.history.curves[key].stats.count <= FEW_POINTS for key in keys)
        return Form(len(keys), panel.log, few)

    def _is_new(self, name: str) -> bool:
        stamp = _stamp(self.run_dir / name)
        is_new = name not in self._stamps or self._stamps[name] != stamp
        self._stamps[name] = stamp
        return is_new


def signature_of(run_dir: Path) -> str:
    """Words that differ whenever a file of the run has changed; those of the heavy images come first."""
    names = (HEATMAP_FILE, TRACE_FILE, METRICS_FILE, EVENTS_FILE, CONFIG_FILE)
    return "-".join(f"{hash(_stamp(run_dir / name)) % 2**64:x}" for name in names)


def _name(form: Form) -> str:
    return f"{form.num_curves} curves{' log' * form.is_log}{' points' * form.has_points}"


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _pack_load(heatmap: Heatmap) -> dict[str, Any] | None:
    frames = frames_of(heatmap)
    if frames is None:
        return None
    packed = {
        "layers": frames.layers,
        "experts": frames.mean.shape[2],
        "firstSteps": frames.first_steps,
        "lastSteps": frames.last_steps,
        "mean": numbers((frames.mean * 256).round(), "<u2"),
    }
    if frames.furthest is not frames.mean:
        packed["furthest"] = numbers((frames.furthest * 256).round(), "<u2")
    return packed


def _pack_layers(history: History) -> dict[str, Any] | None:
    table = history.layers
    steps, values = table.table()
    if not values.size:
        return None
    return {
        "layers": table.layers,
        "names": table.names,
        "steps": [int(step) for step in steps],
        "width": table.width,
        "values": numbers(values, "<f4"),
    }


def _pack_pipeline(pipeline: Pipeline | str | None) -> dict[str, Any] | None:
    if not isinstance(pipeline, Pipeline):
        return None
    both = {"measured": boxes(pipeline.measured), "ideal": boxes(pipeline.ideal)}
    return {"colours": image_figures.KIND_COLOURS, **both}
