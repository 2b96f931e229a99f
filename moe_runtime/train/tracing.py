"""Gathers the spans of a step from the ranks into one trace, on rank 0.

Of a large run not all ranks are asked: one lane of data parallelism shows the whole pipeline, and 64 ranks
fill a screen.
"""

from dataclasses import replace

from moe_runtime.parallel.clock_sync import clock_ahead_s
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.planner.trace import Event, Trace
from moe_runtime.schedule.action import Program, is_transfer

_MOST_RANKS = 64


def collect_trace(runtime: Runtime, peers: Peers, program: Program, step: int) -> Trace | None:
    """The spans that the ranks kept of the step just done, on rank 0; None elsewhere. A collective call.

    Args:
        program: what ran.
        step: its number, from 1.
    """
    mesh = runtime.mesh
    lanes = min(mesh.dp, max(1, _MOST_RANKS // mesh.pp))
    traced = [row * mesh.dp + lane for row in range(mesh.pp) for lane in range(lanes)]
    ahead_s = clock_ahead_s(peers, traced)
    own = [(lane, name, a - ahead_s, b - ahead_s) for lane, name, a, b in runtime.clock.spans or ()]
    heard = peers.first_hears(own, traced)
    if not peers.is_first:
        return None
    begin = min(start for spans in heard.values() for lane, _, start, _ in spans if lane == "action")
    events = tuple(
        Event(place, lane, name, start - begin, end - begin)
        for place, rank in enumerate(traced)
        for lane, name, start, end in heard[rank]
    )
    pp_ranks = tuple(rank // mesh.dp for rank in traced)
    rows = tuple(tuple(entry for entry in row if not is_transfer(entry)) for row in program.rows)
    return Trace(events, replace(program, rows=rows), pp_ranks, step)
