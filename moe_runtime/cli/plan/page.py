"""`moe-runtime plan --page FILE`: a plan as one HTML file that needs nothing else, not even a script."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from moe_runtime.cli.plan.text import describe
from moe_runtime.planner.charts import both_sides, curves, stacked_columns
from moe_runtime.planner.draw import draw_svg
from moe_runtime.planner.hardware.estimate import WORLDS
from moe_runtime.planner.reckon.plan import Plan
from moe_runtime.planner.reckon.scale import AtScale

GIGA, MILLION = 1e9, 1e6
_SHOWN = 12  # figures of the sensitivity chart
_MOST_ENTRIES = 20_000  # of a timeline, beyond which a browser has too much to draw

_STYLE = """
body { font: 15px/1.45 sans-serif; color: #222; max-width: 1240px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; margin-bottom: 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
table { border-collapse: collapse; } td, th { padding: 4px 14px 4px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #ddd; }
.wide { overflow-x: auto; border: 1px solid #ddd; } .side { display: flex; flex-wrap: wrap; gap: 16px; }
.bad { color: #c00000; font-weight: bold; } pre { overflow-x: auto; font-size: 12.5px; }
p { max-width: 900px; }
"""


def page(plan: Plan, scales: Sequence[AtScale]) -> str:
    """The whole page; equal plans give equal pages."""
    title = f"Plan of {plan.config.name} on {plan.cluster.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _verdict(plan),
        _worlds(plan),
        _memory(plan),
        _timeline(plan),
        _scale(plan, scales),
        _sensitivity(plan),
        f"<h2>All figures</h2><pre>{escape(describe(plan))}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _verdict(plan: Plan) -> str:
    layout, run = plan.layout, plan.here.run
    said = (
        f"{layout.world_size:,} × {plan.cluster.accelerator.name}, {plan.config.precision}; pp {layout.pp}, "
        f"dp {layout.dp}, ep {layout.ep}, {plan.here.step.program.name}; {run.tokens:,} tokens."
    )
    fits = f'<p class="bad">{escape(plan.misfit)}</p>' if plan.misfit else ""
    return f"<p>{escape(said)}</p>{fits}"


def _worlds(plan: Plan) -> str:
    worlds = [plan.worlds[name] for name in WORLDS]
    rows = [
        ["tokens/s/GPU", *(f"{one.tokens_per_s_per_gpu:,.0f}" for one in worlds)],
        ["step, s", *(f"{one.step.seconds:.3g}" for one in worlds)],
        ["GPU hours, every step full", *(f"{one.run.steady_gpu_hours:,.0f}" for one in worlds)],
        ["GPU hours, ramp and failures too", *(f"{one.run.gpu_hours_with_failures:,.0f}" for one in worlds)],
        ["their cost, US$", *(f"{one.run.cost(one.run.gpu_hours_with_failures):,.0f}" for one in worlds)],
    ]
    head = "".join(f"<th>{one}</th>" for one in ("all figures at their", "slow end", "centre", "fast end"))
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _memory(plan: Plan) -> str:
    columns = {
        str(rank): {kind.replace("_", " "): size / GIGA for kind, size in one.by_kind().items()}
        for rank, one in enumerate(plan.memory)
    }
    limit = (f"{plan.memory_limit / GIGA:.0f} GB of an accelerator", plan.memory_limit / GIGA)
    chart = stacked_columns(
        "Memory of each pipeline rank at its fullest moment", "GB", "pipeline rank", columns, limit
    )
    return f"<h2>Memory</h2>{chart}"


def _timeline(plan: Plan) -> str:
    step = plan.here.step
    columns = {str(rank): step.phases_of(rank) for rank in range(step.program.num_ranks)}
    phases = stacked_columns("A step of each pipeline rank, by what it does", "s", "pipeline rank", columns)
    entries = sum(map(len, step.timeline.rows))
    if entries > _MOST_ENTRIES:
        drawing = f"<p>The timeline has {entries:,} entries, too many to draw.</p>"
    else:
        drawing = f'<div class="wide">{draw_svg(replace(step.timeline, unit="s"))}</div>'
    return f"<h2>Time</h2>{phases}{drawing}"


def _scale(plan: Plan, scales: Sequence[AtScale]) -> str:
    """Nothing to draw where one size alone is legal."""
    if len(scales) < 2:
        return ""
    sizes = [float(one.accelerators) for one in scales]
    days = curves(
        "Wall time", "days", "GPUs", sizes, {"days, failures included": [one.days for one in scales]}
    )
    cost = curves(
        "Cost",
        "million US$",
        "GPUs",
        sizes,
        {
            "failures included": [one.run.cost(one.run.gpu_hours_with_failures) / MILLION for one in scales],
            "without failures": [one.run.cost(one.run.gpu_hours) / MILLION for one in scales],
        },
    )
    said = "The same layout with fewer and more lanes, and the same global batch, as far as that is legal."
    return f'<h2>Cost against scale</h2><p>{said}</p><div class="side">{days}{cost}</div>'


def _sensitivity(plan: Plan) -> str:
    moved = plan.sensitivity[:_SHOWN]
    if not moved:
        return ""
    chart = both_sides(
        "Change of tokens/s/GPU when one figure of the cluster file moves alone",
        [one.figure for one in moved],
        [one.low for one in moved],
        [one.high for one in moved],
    )
    return f"<h2>What it hangs on</h2>{chart}"
