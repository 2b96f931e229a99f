"""A makespan that no program of a placement can beat, to say how far a found one may be from the best.

Three reasons why a step takes its time; the bound is the greatest of what they say.

*A path.* One microbatch has to go through all stages and back.

*Work.* Look at one rank, with n forwards and n backwards to do in all its stages. No forward reaches it
before `head`. No backward reaches it before `first`: a microbatch has to go to the last stage, and its
gradient come back. So the rank does some t forwards before, all of them alone, and is idle for the rest
of that time. Nor can the step end sooner than `last` after the rank's last forward, whose microbatch
still has to go to the last stage and all the way back; and for this time the rank has the work of the
microbatches it holds at that moment, say t again, none of which overlaps. Everything else overlaps at
best, which saves the greatest `gain` of any pair on the rank each time:

    makespan >= head + max(0, first - head - t F) + work - (n - t) gain + max(0, last - t B)

for some t, and the least over t holds; at t = n, where the idle times before the first backward and after
the last forward are one and the same, the longer of them counts. (With two numbers t and t' in place of
one, replacing both by the greater lowers the right side, so one is enough.) A cap on memory bounds t.

*Memory.* An activation lives at least as long as it takes its microbatch to go on from there and come
back. All these lives have to find room under the cap one after the other:

    makespan >= head + sum of (lives * size) / cap

To hold for unequal stages and for measured pairs, a path counts the least that a forward or a backward
takes, alone or in a pair, and F and B above are the rank's greatest. Before the first backward of all
nothing can overlap, so a path from the start counts forwards alone, up to the shortest whole one.

Rejected: relaxing the problem to a linear program. It needs a solver, and says less plainly why.
"""

from dataclasses import dataclass

from moe_runtime.planner.instance import B, F, I, Instance


def lower_bound(instance: Instance, cap: float | None = None) -> float:
    """The least makespan that any program of the instance could have.

    Args:
        cap: most live memory on a rank; None for any.
    """
    paths = [
        path
        for start in range(0, instance.num_lanes, instance.num_stages)
        for path in _paths(instance, start)
    ]
    filled = min(path.filled for path in paths)
    bounds = [max(path.whole for path in paths)]
    for lanes in instance.lanes_of:
        here = [paths[lane] for lane in lanes]
        head = min(min(path.head, filled) for path in here)
        bounds.append(head + _work(instance, lanes, here, head, filled, cap))
        if cap:
            lives = sum(instance.micros * instance.live[lane] * paths[lane].life for lane in lanes)
            bounds.append(head + lives / cap)
    return max(bounds)


@dataclass(frozen=True, slots=True)
class _Path:
    """Least times of one microbatch as one lane sees them.

    Args:
        head: from its start until it is here.
        filled: until it is through with the forward of the last stage.
        back: from there until its gradient is here.
        last: from the end of its forward here to the end of its step.
        life: from the start of its forward here to the end of its backward here.
        whole: of the whole way there and back.
    """

    head: float
    filled: float
    back: float
    last: float
    life: float
    whole: float


def _paths(instance: Instance, start: int) -> list[_Path]:
    """The paths of one direction's lanes, the first of which is `start`."""
    way = range(start, start + instance.num_stages)
    alone = [instance.time[instance.number(lane, 0, F)] for lane in way]
    forward = [min(instance.time[instance.number(lane, 0, F)], *instance.pair_time[lane]) for lane in way]
    in_pairs = [min(row[lane] for row in instance.pair_time) for lane in way]
    input_grad = [min(instance.time[instance.number(lane, 0, I)], in_pairs[lane - start]) for lane in way]
    backward = [min(instance.time[instance.number(lane, 0, B)], in_pairs[lane - start]) for lane in way]
    hop = [instance.costs.transfer * instance.sent[instance.number(lane, 0, F)] for lane in way]
    filled = sum(alone) + sum(hop)
    whole = filled + sum(input_grad[1:]) + sum(hop) + backward[0]
    found = []
    for s in range(instance.num_stages):
        beyond = sum(forward[s + 1 :]) + sum(hop[s:])
        back = sum(input_grad[s + 1 :]) + sum(hop[s:])
        last = beyond + sum(input_grad[1:]) + sum(hop) + backward[0]
        life = forward[s] + beyond + back + backward[s]
        found.append(_Path(sum(alone[:s]) + sum(hop[:s]), filled, back, last, life, whole))
    return found


def _work(
    instance: Instance, lanes: list[int], paths: list[_Path], head: float, filled: float, cap: float | None
) -> float:
    """The bound by work, from `head` on."""
    forwards = [instance.time[instance.number(lane, 0, F)] for lane in lanes]
    backwards = [instance.time[instance.number(lane, 0, B)] for lane in lanes]
    first = filled + min(path.back for path in paths) - head
    last = min(path.last for path in paths)
    gain = max(0.0, *(instance.gain[f][b] for f in lanes for b in lanes))
    count = instance.micros * len(lanes)
    most = count if cap is None else min(count, int(cap / min(instance.live[lane] for lane in lanes) + 1e-9))
    idle = []
    for t in range(1, most + 1):
        before, after = max(0.0, first - t * max(forwards)), max(0.0, last - t * max(backwards))
        idle.append(t * gain + (before + after if t < count else max(before, after)))
    return instance.micros * (sum(forwards) + sum(backwards)) - count * gain + min(idle)
