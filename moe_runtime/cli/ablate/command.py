"""The command: train what a study lacks, then show its table; or make the tables of a document."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.ablate.documents import fill
from moe_runtime.cli.ablate.results import RESULTS, add_result, check_writable, read_results
from moe_runtime.cli.ablate.study import PlannedRun, Study, planned_runs, read_study
from moe_runtime.errors import ConfigError

FP8_RUNS, DECODE_SPEED = "fp8_loss.jsonl", "decode_mla_mha.json"
STUDIES = Path("configs/run/ablations")


def ablate(
    study: Annotated[
        Path, typer.Argument(help=f"a study, such as {STUDIES}/balance.yaml; a .md with --fill")
    ],
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side; the cores are shared out")] = 2,
    out: Annotated[Path, typer.Option(help="folder of the run folders")] = Path("runs/ablations"),
    results: Annotated[Path, typer.Option(help="measured results, a JSON line a run")] = RESULTS,
    arm: Annotated[list[str] | None, typer.Option(help="train this arm alone; repeat for more")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="train this seed alone; repeat for more")] = None,
    show: Annotated[bool, typer.Option("--show", help="train nothing, show what is measured")] = False,
    fill_document: Annotated[
        bool, typer.Option("--fill", help="STUDY is a document: make its marked tables again")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="also draw the runs over training; .svg, .png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the results instead of the table")] = False,
) -> None:
    """Compare arms that differ in one thing: same data, same seeds, differences in pairs.

    The same command again goes on where it was interrupted; what has a result is not trained again.
    """
    if fill_document:
        changed = fill(study, lambda name: table_of_mark(name, results))
        typer.echo(f"{study}: {'written' if changed else 'up to date'}")
        return
    found = read_study(study)
    runs = planned_runs(found, study)
    if not show:
        _train(_wanted(found, runs, arm, seed), jobs, out, results)
    if as_json:
        known = read_results(results)
        typer.echo(json.dumps([{"arm": run.arm, **known[run.key]} for run in runs if run.key in known]))
        return
    if plot is not None:
        _draw(found, runs, results, plot)
    typer.echo(f"{found.question}\n\n{_table(study, results)}")


def _draw(study: Study, runs: list[PlannedRun], results: Path, file: Path) -> None:
    from moe_runtime.cli.ablate.over_time import draw
    from moe_runtime.cli.ablate.table import results_by_arm

    arms = results_by_arm(study, runs, read_results(results))
    seeds = {arm: list(found.values()) for arm, found in arms.items()}
    draw(study.over_time or ("val_loss",), seeds, study.question, file)


def table_of_mark(name: str, results: Path) -> str:
    """The table of a mark: a study's, or that of a file of other measurements beside the results."""
    from moe_runtime.cli.ablate.arithmetic import arithmetic_table
    from moe_runtime.cli.ablate.decode_speed import decode_table

    others = {FP8_RUNS: arithmetic_table, DECODE_SPEED: decode_table}
    if name in others:
        return others[name](results.with_name(name))
    return _table(STUDIES / name, results)


def _table(path: Path, results: Path) -> str:
    from moe_runtime.cli.ablate.table import study_table

    study = read_study(path)
    return study_table(study, planned_runs(study, path), read_results(results))


def _wanted(
    study: Study, runs: list[PlannedRun], arms: list[str] | None, seeds: list[int] | None
) -> list[PlannedRun]:
    for name in arms or ():
        if name not in study.arms:
            raise ConfigError(f"--arm: expected one of {', '.join(study.arms)}, got {name}")
    for number in seeds or ():
        if number not in study.seeds:
            known = ", ".join(map(str, study.seeds))
            raise ConfigError(f"--seed: expected one of the study's seeds {known}, got {number}")
    return [run for run in runs if (not arms or run.arm in arms) and (not seeds or run.seed in seeds)]


def _train(runs: list[PlannedRun], jobs: int, out: Path, results: Path) -> None:
    known = read_results(results)
    lacking = list({run.key: run for run in runs if run.key not in known}.values())
    if not lacking:
        return
    from moe_runtime.cli.ablate.train_arms import LOG, Trainer
    from moe_runtime.train.run_lock import enter_run

    check_writable(results)
    lock = enter_run(out)  # another command would train the same runs

    typer.echo(
        f"{len(lacking)} of {len(runs)} runs to train, {jobs} side by side; see {out}/*/{LOG}", err=True
    )

    def done(run: PlannedRun, measured: Path) -> None:
        result = add_result(results, run, measured)
        loss, seconds = result["measures"]["val_loss"], result["train_s"]
        typer.echo(f"arm {run.arm}, seed {run.seed}: validation loss {loss:.4f}, {seconds:,.0f} s", err=True)

    try:
        Trainer(out.absolute(), jobs).train(lacking, done)
    finally:
        if lock is not None:
            lock.close()
