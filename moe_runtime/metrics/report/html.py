"""The whole page as one text: frame, style, script, Bokeh and data, all inside.

Bokeh's script is carried compressed, and unpacked by the page's own script: 0.5 MB instead of 1.3, and no
address of any kind stands in the file. A content security policy in the page forbids it every request, except
to where it came from while it follows a run.
"""

from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_runtime.metrics.panel import SECTIONS
from moe_runtime.metrics.report.bokeh_parts import library
from moe_runtime.metrics.report.curves_of_panels import line_panels, panel_id
from moe_runtime.metrics.report.packing import as_json, packed
from moe_runtime.metrics.report.run_view import RunView
from moe_runtime.metrics.report.shown import visible
from moe_runtime.metrics.report.texts import templates, texts_of

_SCRIPTS = (
    "unpack.js",
    "state.js",
    "lines.js",
    "images.js",
    "pipeline.js",
    "controls.js",
    "print.js",
    "live.js",
    "start.js",
)
_OTHERS = (("samples", "Samples"), ("events", "Events"), ("config", "Config"), ("files", "Files"))


def page(view: RunView, page_dir: Path | None) -> str:
    """The report as HTML.

    Args:
        view: of the run; it has looked.
        page_dir: where the page will be kept, for links to files; None: it is served, and follows the run.
    """
    texts = {name: Markup(text) for name, text in texts_of(view, page_dir).items()}
    panels = [(panel, panel_id(panel)) for panel in line_panels()]
    sections = [(name, [each for each in panels if each[0].section == name]) for name in SECTIONS]
    data = view.data()
    contents = [("summary", "Summary"), *((name.lower(), name) for name in SECTIONS), *_OTHERS]
    return (
        templates()
        .get_template("page.html")
        .render(
            name=visible(view.run_dir.resolve().name, 120),
            live=page_dir is None,
            signature=view.signature,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            contents=contents,
            sections=sections,
            texts=texts,
            shown=data["plots"].keys(),
            style=Markup(_asset("page.css")),
            bare_style=Markup(_asset("bare.css")),  # of browsers that run no script
            script=Markup("\n".join(map(_asset, _SCRIPTS))),
            library=Markup(_packed_library()),
            data=Markup(packed(as_json(data))),
        )
    )


def update(view: RunView, known: str) -> dict[str, Any]:
    """What a page that is as of the signature `known` takes in: data, and texts by id."""
    return {"data": view.data(known), "texts": texts_of(view, None)}


@cache
def _packed_library() -> str:
    return packed(library())


@cache
def _asset(name: str) -> str:
    return files("moe_runtime.metrics.report").joinpath("page", name).read_text(encoding="utf-8")
