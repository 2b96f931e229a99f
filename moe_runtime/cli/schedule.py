"""`moe-runtime schedule`: print, check, simulate and draw a pipeline schedule, or the trace of a step."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli import schedule_text
from moe_runtime.errors import ConfigError, ScheduleError
from moe_runtime.planner.costs_text import DEFAULT, ModelCosts, read_costs
from moe_runtime.planner.draw import draw_svg
from moe_runtime.planner.draw_text import draw_text
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.measured_costs import measured_costs, whole_model
from moe_runtime.planner.outcome import Outcome, assess
from moe_runtime.planner.search import SHAPES, search
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Timeline
from moe_runtime.planner.trace import read_trace
from moe_runtime.schedule import BUILDERS, Program, add_transfers, build

SEARCHED, ALL = "searched", "all"
_MOST_CELLS = 1_000_000  # some minutes of building and checking


def schedule(
    name: Annotated[
        str | None, typer.Argument(help="a schedule, 'searched', 'all' to compare them, or a program file")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, max=4096, help="P, pipeline ranks")] = None,
    microbatches: Annotated[int | None, typer.Option(min=1, help="M, over both directions")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="stages a rank, of interleaved and searched")
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            help=f"of one P-th of the model: F, B or I and W, exchange C and CB, transfer T, share hidden "
            f"H; or a trace.json, whose costs are taken [default: {DEFAULT}]"
        ),
    ] = None,
    cap: Annotated[
        float | None, typer.Option(min=0, help="most live microbatches on a rank, in P-ths of the model")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="trace.json of a run, instead of a schedule")] = None,
    svg: Annotated[Path | None, typer.Option(help="file to draw into")] = None,
    lowered: Annotated[bool, typer.Option("--lowered", help="print the program with transfers")] = False,
    text: Annotated[bool, typer.Option("--text", help="print the program's text and nothing else")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Print, check, simulate and draw a pipeline schedule, or measure and draw the trace of a real step.

    NAME may be a file written by --text. Peak live counts microbatches that a rank holds for a backward.
    """
    if trace is not None:
        own: dict[str, object] = {"NAME": name, "--ranks": ranks, "--microbatches": microbatches}
        own |= {"--chunks": chunks, "--costs": costs, "--cap": cap}
        own |= {"--lowered": lowered or None, "--text": text or None}
        _show_trace(trace, own, svg, as_json)
    elif name == ALL:
        if svg is not None or text or lowered:
            raise ConfigError("schedule all: --svg, --text and --lowered show one schedule; give its name")
        _compare(*_sizes(name, ranks, microbatches), chunks, costs, _finite(cap), as_json)
    else:
        outcome = _outcome(name, ranks, microbatches, chunks, costs, _finite(cap))
        _save(svg, outcome.timeline)
        _show(outcome, lowered, text, as_json)


def _show(outcome: Outcome, lowered: bool, text: bool, as_json: bool) -> None:
    if text and as_json:
        raise ConfigError("schedule: expected one of --text and --json, got both; leave one out")
    shown = outcome.program
    if lowered and not shown.has_transfers:
        shown = add_transfers(shown)
    if text:
        typer.echo(shown.to_text(), nl=False)
    elif as_json:
        typer.echo(json.dumps(schedule_text.as_fields(outcome, shown)))
    else:
        typer.echo(schedule_text.describe(outcome, shown))
        typer.echo(draw_text(outcome.timeline, _width()), nl=False)


def _outcome(
    name: str | None,
    ranks: int | None,
    microbatches: int | None,
    chunks: int | None,
    costs: str | None,
    cap: float | None,
) -> Outcome:
    """One schedule, by whatever kind of name."""
    if name is None:
        names = ", ".join([*BUILDERS, SEARCHED, ALL])
        raise ConfigError(f"schedule: expected a NAME ({names}, or a program file) or --trace FILE, got none")
    if name not in (*BUILDERS, SEARCHED) and Path(name).is_file():
        program = _read_program(Path(name), ranks, microbatches, chunks)
        given = _costs(costs, program.num_ranks)
    elif "/" in name or name.endswith(".txt"):
        raise ConfigError(f"{name}: no such program file; write one with --text")
    else:
        num_ranks, num_microbatches = _sizes(name, ranks, microbatches)
        given = _costs(costs, num_ranks)
        if name == SEARCHED:
            return _searched(num_ranks, num_microbatches, given, cap, _shapes(chunks))
        program = build(name, num_ranks, num_microbatches, chunks)
    return assess(program, given.of(program.num_ranks, program.num_stages), cap=cap, unit=given.unit)


def _shapes(chunks: int | None) -> tuple[str, ...]:
    """Where a search may lay stages: anywhere, or as a run does with so many chunks."""
    of_runs = {None: tuple(SHAPES), 1: ("straight",), 2: ("v",), 4: ("w",)}
    if chunks not in of_runs:
        raise ConfigError(
            f"schedule searched: expected --chunks 1, 2 or 4, got {chunks}; leave it out for all"
        )
    return of_runs[chunks]


def _searched(
    num_ranks: int,
    num_microbatches: int,
    given: ModelCosts,
    cap: float | None,
    shapes: tuple[str, ...] = tuple(SHAPES),
) -> Outcome:
    found = search(
        num_ranks,
        num_microbatches,
        given.model,
        cap=cap,
        shapes=shapes,
        transfer=given.transfer,
        hidden=given.hidden,
    )
    return assess(found.program, found.costs, cap=cap, bound=found.bound, unit=given.unit)


def _compare(
    ranks: int, microbatches: int, chunks: int | None, costs: str | None, cap: float | None, as_json: bool
) -> None:
    """Every schedule that admits the sizes, the shortest first, and why the others do not."""
    given = _costs(costs, ranks)
    outcomes, refused = [], {}
    for name in BUILDERS:
        try:
            program = build(name, ranks, microbatches, chunks if name == "interleaved" else None)
        except ScheduleError as error:
            refused[name] = str(error)
            continue
        outcomes.append(assess(program, given.of(ranks, program.num_stages), cap=cap, unit=given.unit))
    outcomes.append(_searched(ranks, microbatches, given, cap))
    least = min(outcome.bound for outcome in outcomes)  # each is a bound of its own placement alone
    outcomes = [replace(outcome, bound=least) for outcome in outcomes]
    outcomes.sort(key=lambda outcome: outcome.timeline.makespan)
    if as_json:
        fields = [schedule_text.as_fields(outcome, outcome.program) for outcome in outcomes]
        typer.echo(json.dumps({"schedules": fields, "refused": refused}))
    else:
        typer.echo(schedule_text.compare(outcomes, refused))


def _show_trace(path: Path, own: dict[str, object], svg: Path | None, as_json: bool) -> None:
    """A measured step, and beside it the same program simulated with the costs measured in it.

    Args:
        own: options that a schedule takes and a trace does not.
    """
    extra = [option for option, value in own.items() if value is not None]
    if extra:
        raise ConfigError(f"schedule: --trace brings a step of its own, got {extra[0]} too; leave it out")
    trace = read_trace(path)
    try:
        measured, costs = timeline_of(trace), measured_costs(trace)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    simulated = replace(simulate(trace.program, costs), unit="s")
    _save(svg, measured)
    if as_json:
        typer.echo(json.dumps(schedule_text.trace_fields(trace, measured, simulated, costs)))
    else:
        typer.echo(schedule_text.describe_trace(measured, simulated, costs))
        typer.echo(draw_text(measured, _width()), nl=False)


def _sizes(name: str, ranks: int | None, microbatches: int | None) -> tuple[int, int]:
    if ranks is None or microbatches is None:
        missing = "--ranks" if ranks is None else "--microbatches"
        raise ConfigError(f"schedule {name}: expected --ranks P and --microbatches M, got no {missing}")
    if ranks * microbatches > _MOST_CELLS:
        got = f"got {ranks} x {microbatches}"
        raise ConfigError(f"schedule {name}: expected ranks x microbatches of at most {_MOST_CELLS:,}, {got}")
    return ranks, microbatches


def _read_program(path: Path, *sizes: int | None) -> Program:
    if any(size is not None for size in sizes):
        what = "--ranks, --microbatches and --chunks are those of the file"
        raise ConfigError(f"{path}: {what}; leave them out")
    try:
        return Program.from_text(path.read_text())
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a program as --text prints it, got no text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def _costs(given: str | None, num_ranks: int) -> ModelCosts:
    """Costs typed in, or measured and spread evenly over `num_ranks`-ths of the model."""
    if given is None or not (given.endswith(".json") or Path(given).is_file()):
        return read_costs(DEFAULT if given is None else given)
    trace = read_trace(Path(given))
    try:
        costs = measured_costs(trace)
    except ConfigError as error:
        raise ConfigError(f"{given}: {error}") from None
    return ModelCosts(whole_model(costs, num_ranks), costs.transfer, costs.hidden, "s")


def _save(path: Path | None, timeline: Timeline) -> None:
    if path is None:
        return
    try:
        path.write_text(draw_svg(timeline))
    except OSError as error:
        raise ConfigError(f"--svg {path}: cannot be written: {error.strerror}; give another file") from None


def _finite(cap: float | None) -> float | None:
    if cap is not None and not math.isfinite(cap):
        raise ConfigError(f"--cap: expected a number of 0 or more, got {cap:g}; leave it out for no cap")
    return cap


def _width() -> int:
    return shutil.get_terminal_size((120, 24)).columns
