"""One measurement from settings to figures; runs in the process of the command."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from moe_runtime.cli.bench_pipeline.calibrate import Step, calibrate
from moe_runtime.cli.bench_pipeline.settings import CALIBRATED_WITH, Settings, why_not
from moe_runtime.cli.bench_pipeline.summary import summarise
from moe_runtime.cli.testbed.crew import Crew, cpu_load, open_crew, working_folder
from moe_runtime.cli.testbed.links import Testbed, open_testbed, require_tools
from moe_runtime.cli.testbed.quota import open_shares
from moe_runtime.errors import ConfigError

_RANK = "moe_runtime.cli.bench_pipeline.rank"
_SILENCE_S = 600.0


def measure(settings: Settings) -> dict[str, Any]:
    """Run every contender in turn, several rounds.

    Returns:
        {"settings", "skipped": {contender: reason}, "one_to_one", "contenders": figures, "rounds": what
        every rank said of every step}.

    Raises:
        ConfigError: links or shares cannot be had, or nobody can run.
        RankFailed: a rank died.
    """
    if settings.has_links:
        require_tools()
    skipped = {name: reason for name in settings.contenders if (reason := why_not(settings, name))}
    runners = [name for name in settings.contenders if name not in skipped]
    if not runners:
        raise ConfigError(f"bench pipeline: no contender can run: {'; '.join(skipped.values())}")
    measured_with = _calibrated_with(settings) if settings.has_links and settings.rate_mbit is None else None
    held = runners if measured_with is None else list(dict.fromkeys([*runners, measured_with]))
    result: dict[str, Any] = {"settings": settings.to_plain(), "skipped": skipped, "load": cpu_load()}
    with _running(dataclasses.replace(settings, contenders=tuple(held))) as (crew, testbed):
        checked = {name: _step(crew, name, compare=True) for name in runners}
        rate = settings.rate_mbit
        if testbed is not None and measured_with is not None:
            found = calibrate(measured_with, lambda name: _step(crew, name), testbed.limit)
            result["one_to_one"] = dataclasses.asdict(found) | {"ratio": found.ratio}
            rate = found.rate_mbit
        elif testbed is not None:
            testbed.limit(rate)
        rounds = []
        for turn in range(settings.rounds):
            rounds.append({name: _step(crew, name) for name in runners})
            print(f"round {turn + 1} of {settings.rounds}", file=sys.stderr, flush=True)
    figures = summarise(checked, rounds, settings)
    return result | {"rate_mbit": rate, "contenders": figures, "rounds": rounds}


@contextmanager
def _running(settings: Settings) -> Iterator[tuple[Crew, Testbed | None]]:
    """All ranks, with their contenders set up; links have no limit yet."""
    with ExitStack() as stack:
        testbed = None
        if settings.has_links:
            testbed = stack.enter_context(open_testbed(settings.world_size, None))
        shares: list[str] = []
        if settings.cores is not None:
            shares = list(map(str, stack.enter_context(open_shares(settings.world_size, settings.cores))))
        folder = stack.enter_context(working_folder())
        crew = stack.enter_context(open_crew(_RANK, settings.world_size, folder, _SILENCE_S, testbed))
        crew.ask({"settings": settings.to_plain(), "shares": shares})
        yield crew, testbed
        crew.ask({"leave": True})


def _step(crew: Crew, name: str, compare: bool = False) -> Step:
    return crew.ask({"run": name, "compare": compare})


def _calibrated_with(settings: Settings) -> str:
    """Without overlap; where pairs cannot be taken apart, a schedule that has none."""
    return CALIBRATED_WITH if why_not(settings, CALIBRATED_WITH) is None else "1f1b"
