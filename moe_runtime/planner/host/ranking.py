"""A search's ranking again, where ranks share cores.

The search looks at layouts as if every rank had an accelerator to itself. Where ranks are processes of one
machine, those that it put on a clock are put on the cores too, and ranked by that. The others stay behind
them: their bounds hold, since sharing makes nothing faster.
"""

from dataclasses import replace

from moe_runtime.planner.host.step import host_step
from moe_runtime.planner.reckon.layouts import Ranked, Search, front_of


def rank_on_cores(found: Search) -> Search:
    """The same layouts, those that are exact in the order and with the times that the host gives them.

    Raises:
        ConfigError: the cluster has no host.
    """
    timed = [
        Ranked(one.candidate, host_step(one.candidate.config, found.cluster).step_s, exact=True)
        for one in found.ranked
        if one.exact
    ]
    timed.sort(key=lambda one: (one.seconds, one.candidate.nbytes))
    others = [one for one in found.ranked if not one.exact]
    return replace(found, ranked=(*timed, *others), front=tuple(front_of(timed)))
