"""What a launcher runs, told before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_runtime.config.reliability import ReliabilityConfig
from moe_runtime.config.schema import RunConfig

# A command that keeps nothing would only begin anew.
NO_RESTARTS = ReliabilityConfig(restarts=0)


@dataclass(frozen=True)
class Machines:
    """This machine among others.

    Args:
        least, most: machines that the run needs, and that it can use.
        rank: number of this machine; 0 is where all meet.
        host, port: of machine 0, as all machines were given it.
        address: of this machine, as the others see it.
    """

    least: int
    most: int
    rank: int
    host: str
    port: int
    address: str


@dataclass(frozen=True)
class Job:
    """The ranks of one launcher.

    Args:
        program: what every rank runs: `-m`, a module and its arguments.
        ranks: on this machine.
        environment: variables for the ranks; those that are already set win.
        reliability: how failures are met.
        run_dir: where the run keeps its records and checkpoints; None: it keeps nothing.
        timeout_s: for ranks and machines to meet.
        machines: None: this one alone.
        config: of a training run; None: of another command, which takes the machine as it is.
    """

    program: tuple[str, ...]
    ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)
    reliability: ReliabilityConfig = NO_RESTARTS
    run_dir: Path | None = None
    timeout_s: float = 600.0
    machines: Machines | None = None
    config: RunConfig | None = None

    def arguments(self, attempt: int, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Of Python, for one attempt: what is to begin anew does so once."""
        fresh = ("--fresh",) if attempt > 1 else ()
        return ("-u", *(word for word in self.program if word not in fresh), *overrides)
