"""The ranks of one measurement of exchanges."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.testbed.crew import open_crew
from moe_runtime.cli.testbed.links import open_testbed


def run_crew(settings: Settings, folder: Path, silence_s: float) -> list[dict[str, Any]]:
    """Run one measurement on as many processes as it has ranks.

    Args:
        settings: of the measurement; with a rate, ranks run in namespaces joined by links.
        folder: holds what ranks read; they get its path.
        silence_s: a time in which no rank says a word ends it.

    Returns:
        What each rank said, in rank order.

    Raises:
        ConfigError: links cannot be made.
        RankFailed: a rank died or all are silent; the others are ended.
    """
    with ExitStack() as stack:
        testbed = None
        if settings.rate_mbit is not None:
            testbed = stack.enter_context(open_testbed(settings.nodes, settings.rate_mbit))
        module, size = "moe_runtime.cli.bench_comm.rank", settings.world_size
        crew = stack.enter_context(open_crew(module, size, folder, silence_s, testbed, settings.node_of))
        return crew.ask(settings.to_plain())
