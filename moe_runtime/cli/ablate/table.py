"""A study's table in Markdown: each arm's figures, and their paired differences from one arm."""

from collections.abc import Iterable
from typing import Any

from moe_runtime.cli.ablate.columns import COLUMNS, Column
from moe_runtime.cli.ablate.curve import curve_text
from moe_runtime.cli.ablate.over_time import over_time_table
from moe_runtime.cli.ablate.study import PlannedRun, Study
from moe_runtime.evaluation.intervals import Interval, mean_interval, paired_interval

Results = dict[str, dict[str, Any]]
ABSENT = "-"


def study_table(study: Study, runs: list[PlannedRun], results: Results) -> str:
    """What is known of a study so far.

    Args:
        study: with its columns.
        runs: all that it needs.
        results: by key; those that are missing leave gaps.
    """
    arms = results_by_arm(study, runs, results)
    columns = [COLUMNS[name] for name in study.columns]
    head = ["arm", *(column.title for column in columns)]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [
        _row([arm, *(_figure(column, found.values()) for column in columns)]) for arm, found in arms.items()
    ]
    base = arms[study.against]
    for arm, found in arms.items():
        if arm != study.against:
            cells = [_difference(column, found, base) for column in columns]
            lines.append(_row([f"{arm} - {study.against}", *cells]))
    seeds = {arm: list(found.values()) for arm, found in arms.items()}
    parts = ["\n".join([*lines, "", _provenance(runs, results)])]
    parts += [over_time_table(name, seeds) for name in study.over_time]
    if study.curve:
        parts.append(curve_text(seeds))
    return "\n\n".join(parts)


def results_by_arm(study: Study, runs: list[PlannedRun], results: Results) -> dict[str, dict[int, Any]]:
    """What has been measured of each arm, by seed in ascending order."""
    ordered = sorted(runs, key=lambda run: run.seed)
    return {
        arm: {run.seed: results[run.key] for run in ordered if run.arm == arm and run.key in results}
        for arm in study.arms
    }


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(column: Column, results: Iterable[dict[str, Any]]) -> str:
    """Mean over seeds and half the 95% interval; the number alone if no seed changes it."""
    values = [value for result in results if (value := column.of(result)) is not None]
    if not values:
        return ABSENT
    if column.exact:
        return f"{values[0]:,.{column.digits}f}"
    found = mean_interval(values)
    unknown = len(values) == 1 or found.half != found.half
    return f"{found.mean:,.{column.digits}f}" + ("" if unknown else f" ± {found.half:,.{column.digits}f}")


def difference(column: Column, found: dict[int, Any], base: dict[int, Any]) -> Interval | None:
    """Paired difference over the seeds that both arms have; in percent for a relative column."""
    pairs = [(column.of(found[seed]), column.of(base[seed])) for seed in found if seed in base]
    whole = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    if not whole:
        return None
    if column.relative:
        return mean_interval([100 * (mine / theirs - 1) for mine, theirs in whole])
    return paired_interval([mine for mine, _ in whole], [theirs for _, theirs in whole])


def _difference(column: Column, found: dict[int, Any], base: dict[int, Any]) -> str:
    interval = difference(column, found, base)
    if interval is None:
        return ABSENT
    unit, digits = ("%", 2) if column.relative else ("", column.digits)
    text = f"{interval.mean:+,.{digits}f}{unit}"
    if column.exact:
        return text
    if interval.mean != interval.mean:
        return "not a number: a run diverged"
    if interval.low != interval.low:
        return f"{text} (one seed)"
    word = "resolved" if interval.resolved else "not resolved"
    return f"{text} ({interval.low:+,.{digits}f} to {interval.high:+,.{digits}f}), {word}"


def _provenance(runs: list[PlannedRun], results: Results) -> str:
    """Which seeds, how many tokens, how long, on what."""
    mine = [results[run.key] for run in runs if run.key in results]
    if not mine:
        return "No run of it has been measured yet."
    seeds = sorted({run.seed for run in runs if run.key in results})
    missing = len({run.key for run in runs} - results.keys())
    tokens = sorted({result["tokens"] for result in mine})
    seconds = sorted(result["train_s"] for result in mine)
    shown = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    text = (
        f"{len(mine)} runs, seeds {', '.join(map(str, seeds))}, {shown} tokens each, {seconds[0]:,.0f} to "
        f"{seconds[-1]:,.0f} s of training; {mine[0]['machine']}."
    )
    return text + (f" {missing} runs are missing." if missing else "")
