"""What failures take: how often a job is interrupted, how often it should save, how much of its time trains.

Failures of machines come independently, so a job on N nodes has one every M = 1 / (N x rate) in the mean.
Each costs the restart R and the work since the last save, half an interval W in the mean; each save costs its
pause C.

    share that trains = 1 / (1 + C / W + (W / 2 + R) / M)       best interval W = sqrt(2 C M)

Ref: Young 1974, first order; good while C is far below M. The share is of wall time: work that is done twice
does not count. Beyond W = M the formula says that nearly nothing trains, which is so, but not how little.
"""

import math
from dataclasses import dataclass

from moe_runtime.planner.hardware.cluster import Failures
from moe_runtime.planner.hardware.estimate import World

DAY_S, MINUTE_S = 86_400.0, 60.0


@dataclass(frozen=True)
class Reliability:
    """Times in seconds.

    Args:
        between_failures: mean time from failure to failure of the whole job; infinite if none ever fails.
        interval: between saves, the best one unless it was given.
        saving, redoing, restarting: wall time that each takes, per second of training.
    """

    between_failures: float
    interval: float
    saving: float
    redoing: float
    restarting: float

    @property
    def training_share(self) -> float:
        """Of the wall time, what trains."""
        return 1.0 / (1.0 + self.saving + self.redoing + self.restarting)


def reliability(failures: Failures, nodes: int, world: World, interval_s: float | None = None) -> Reliability:
    """What failures take of a job.

    Args:
        nodes: that all have to work.
        interval_s: between saves; None: the best.
    """
    rate = failures.per_node_day.burden(world) * nodes / DAY_S
    pause = failures.save_s.burden(world)
    if rate == 0:
        return Reliability(math.inf, math.inf if interval_s is None else interval_s, 0.0, 0.0, 0.0)
    between = 1.0 / rate
    interval = max(math.sqrt(2 * pause * between), pause) if interval_s is None else interval_s
    return Reliability(
        between_failures=between,
        interval=interval,
        saving=pause / interval if interval else 0.0,
        redoing=interval / 2 / between,
        restarting=failures.restart_minutes.burden(world) * MINUTE_S / between,
    )
