"""One measurement from settings to figures; runs in the process of the command."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_pipeline.calibrate import Step, calibrate
from moe_runtime.cli.bench_pipeline.settings import CALIBRATED_WITH, Settings
from moe_runtime.cli.bench_pipeline.summary import summarise
from moe_runtime.cli.bench_pipeline.traces import write_traces
from moe_runtime.cli.testbed.crew import Crew, cpu_load, open_crew, working_folder
from moe_runtime.cli.testbed.links import Testbed, open_testbed, require_tools
from moe_runtime.cli.testbed.quota import open_shares
from moe_runtime.errors import ConfigError

_RANK = "moe_runtime.cli.bench_pipeline.rank"
_SILENCE_S = 600.0


def measure(settings: Settings, traces: Path | None = None) -> dict[str, Any]:
    """Run every contender in turn, several rounds.

    Args:
        traces: folder for a trace of each of our contenders' last step.

    Returns:
        {"settings", "skipped": {contender: reason}, "said": {contender: how its program was found},
        "one_to_one", "contenders": figures, "rounds": what every rank said of every step}.

    Raises:
        ConfigError: links or shares cannot be had, or nobody can run.
        RankFailed: a rank died.
    """
    if settings.has_links:
        require_tools()
    is_calibrated = settings.has_links and settings.rate_mbit is None
    held = dict.fromkeys([*settings.contenders, *(CALIBRATED_WITH if is_calibrated else ())])
    result: dict[str, Any] = {"settings": settings.to_plain(), "load": cpu_load()}
    with _running(dataclasses.replace(settings, contenders=tuple(held))) as (crew, testbed, opened):
        refused, result["said"] = opened["refused"], opened["said"]
        runners = [name for name in settings.contenders if name not in refused]
        if not runners:
            raise ConfigError(f"bench pipeline: no contender can run: {_reasons(refused)}")
        checked = {name: _step(crew, name, compare=True) for name in runners}
        rate = settings.rate_mbit
        if testbed is not None and rate is None:
            result["one_to_one"] = found = _calibrate(crew, testbed, refused)
            rate = found["rate_mbit"]
        elif testbed is not None:
            testbed.limit(rate)
        rounds = []
        for turn in range(settings.rounds):
            rounds.append({name: _step(crew, name) for name in runners})
            print(f"round {turn + 1} of {settings.rounds}", file=sys.stderr, flush=True)
    figures = summarise(checked, rounds, settings)
    if traces is not None:
        write_traces(rounds[-1], settings, traces)
    for rank in (rank for turn in rounds for step in turn.values() for rank in step):
        del rank["spans"], rank["program"]
    skipped = {name: refused[name] for name in settings.contenders if name in refused}
    return result | {"skipped": skipped, "rate_mbit": rate, "contenders": figures, "rounds": rounds}


def _calibrate(crew: Crew, testbed: Testbed, refused: dict[str, str]) -> dict[str, Any]:
    usable = [name for name in CALIBRATED_WITH if name not in refused]
    if not usable:
        raise ConfigError(f"bench pipeline: nobody to calibrate with: {_reasons(refused)}; give a --rate")
    found = calibrate(usable[0], lambda name: _step(crew, name), testbed.limit)
    return dataclasses.asdict(found) | {"ratio": found.ratio}


def _reasons(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refused.items())


@contextmanager
def _running(settings: Settings) -> Iterator[tuple[Crew, Testbed | None, dict[str, Any]]]:
    """All ranks, and what they say of their contenders; links have no limit yet."""
    with ExitStack() as stack:
        testbed = None
        if settings.has_links:
            testbed = stack.enter_context(open_testbed(settings.world_size, None))
        shares: list[str] = []
        if settings.cores is not None:
            shares = list(map(str, stack.enter_context(open_shares(settings.world_size, settings.cores))))
        folder = stack.enter_context(working_folder())
        crew = stack.enter_context(open_crew(_RANK, settings.world_size, folder, _SILENCE_S, testbed))
        opened = crew.ask({"settings": settings.to_plain(), "shares": shares})
        yield crew, testbed, opened[0]  # all ranks say the same
        crew.ask({"leave": True})


def _step(crew: Crew, name: str, compare: bool = False) -> Step:
    return crew.ask({"run": name, "compare": compare})
