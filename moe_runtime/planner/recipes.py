"""Recipes for rows, drawn at random and varied: where the search gets its starting points from.

A recipe is a `Policy` for list scheduling or a `Way` to repeat. Neither is best everywhere. Policies
fill idle time well and find the best programs while memory is plenty; ways are better where it is
short. Lengths of time are drawn as multiples of a stage's own, so that a recipe means the same for
costs in seconds as for costs in units, and for many short stages as for few long ones.
"""

import math
from dataclasses import replace
from random import Random

from moe_runtime.planner.instance import B, F, I, Instance, Rows
from moe_runtime.planner.list_schedule import Policy, list_schedule
from moe_runtime.planner.pattern import Way, repeat

Recipe = Policy | Way

_MERITS = (-10.0, -2.0, -0.5, -0.25, 0.0, 0.0, 0.25, 0.5, 1.0, 2.0, 10.0)
_PERIODS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


def follow(instance: Instance, recipe: Recipe, cap: float) -> Rows:
    """The rows of a recipe; those of a way may break the cap or wait for ever."""
    if isinstance(recipe, Policy):
        return list_schedule(instance, recipe, cap)
    return repeat(instance, recipe)


def proven(instance: Instance, cap: float) -> list[Recipe]:
    """Recipes that have often led to the best programs; the first has rows under any cap."""
    ranks = instance.num_ranks
    full, nearly = (math.inf,) * ranks, (min(cap, ranks) - 0.3,) * ranks
    half = 0.5 * _mean(instance, F)
    policies: list[Recipe] = [
        Policy(full),
        Policy(full, forward_deep=1.0, backward_deep=2.0, weight_delay=0.8 * half),
        Policy(full, forward_deep=-0.25, backward_deep=2.0, pair_patience=half, forward_first=True),
        Policy(nearly, forward_deep=-0.25, backward_deep=2.0, pair_patience=half, forward_first=True),
        Policy(full, backward_deep=10.0, pair_patience=half),
        Policy(nearly, forward_deep=10.0, backward_deep=-0.5, pair_patience=half),
    ]
    if cap == math.inf:
        return policies
    at_once = ((0.0,) * (2 * instance.num_lanes), (False,) * instance.num_lanes)
    return policies + [Way(_work(instance) * period, *at_once) for period in (0.9, 1.0, 1.05, 1.3)]


def draw(rng: Random, instance: Instance, cap: float) -> Recipe:
    """A recipe out of the blue."""
    share_of_ways = 0.6 if cap < math.inf else 0.2
    return _way(rng, instance) if rng.random() < share_of_ways else _policy(rng, instance, cap)


def vary(rng: Random, instance: Instance, recipe: Recipe, cap: float) -> Recipe:
    """A recipe much like another."""
    if isinstance(recipe, Way):
        delays = list(recipe.delays)
        for _ in range(rng.choice((1, 1, 2, 4))):
            delays[rng.randrange(len(delays))] = _delay(rng, instance)
        period = recipe.period * rng.choice((1.0, 1.0, 1.0, 0.9, 0.95, 0.98, 1.05))
        way = replace(recipe, period=period, delays=tuple(delays))
        return _vary_joining(rng, instance, way) if _gains(instance) and rng.random() < 0.5 else way
    fresh = _policy(rng, instance, cap)
    names = rng.sample(Policy.__slots__, rng.choice((1, 1, 2)))
    varied = replace(recipe, **{name: getattr(fresh, name) for name in names if name != "depth"})
    if "depth" not in names:
        return varied
    depth = list(recipe.depth if max(recipe.depth) < math.inf else fresh.depth)
    depth[rng.randrange(len(depth))] += rng.choice((-1, 1)) * min(instance.live) * rng.choice((1, 2))
    return replace(varied, depth=tuple(depth))


def _policy(rng: Random, instance: Instance, cap: float) -> Policy:
    forward, grad, weight = (_mean(instance, kind) for kind in range(3))
    return Policy(
        depth=_depth(rng, instance, cap),
        forward_deep=rng.choice(_MERITS),
        backward_deep=rng.choice(_MERITS),
        pair_patience=rng.choice((0.0, 0.5, 1.0, 2.0, 4.0)) * forward,
        grad_patience=rng.choice((0.0, 0.0, 0.5, 1.0, 2.0)) * grad,
        weight_delay=rng.choice((0.0, 0.0, 0.5, 1.0)) * weight,
        owed=rng.choice((math.inf, math.inf, 0.0, 1.0, 2.0)),
        forward_first=rng.random() < 0.3,
    )


def _depth(rng: Random, instance: Instance, cap: float) -> tuple[float, ...]:
    """How deep each rank warms up: any depth, or a straight line over the ranks."""
    ranks = instance.num_ranks
    if rng.random() < 0.3:
        return (math.inf,) * ranks
    middle = rng.uniform(0.5, min(cap, ranks) + 2.0)
    slope = rng.choice((-0.5, 0.0, 0.0, 0.5, 1.0, 1.5))
    return tuple(max(0.5, middle + slope * ((ranks - 1) / 2 - rank)) for rank in range(ranks))


def _way(rng: Random, instance: Instance) -> Way:
    is_delayed = rng.random() < 0.7
    delays = [
        _delay(rng, instance) if is_delayed and rng.random() < 0.3 else 0.0
        for _ in range(2 * instance.num_lanes)
    ]
    share = rng.choice((0.0, 0.3, 0.6, 1.0)) if _gains(instance) else 0.0
    hosts = tuple(rng.random() < share for _ in range(instance.num_lanes))
    return Way(_work(instance) * rng.choice(_PERIODS), tuple(delays), hosts, _patience(rng, instance))


def _vary_joining(rng: Random, instance: Instance, way: Way) -> Way:
    hosts = list(way.hosts)
    hosts[rng.randrange(len(hosts))] ^= True
    patience = way.patience if rng.random() < 0.5 else _patience(rng, instance)
    return replace(way, hosts=tuple(hosts), patience=patience)


def _patience(rng: Random, instance: Instance) -> float:
    return rng.choice((0.0, 0.5, 1.0, 2.0, 4.0, 8.0)) * _mean(instance, I)


def _work(instance: Instance) -> float:
    """What one microbatch of each direction takes of the busiest rank."""
    times = [instance.time[instance.number(lane, 0, F)] for lane in range(instance.num_lanes)]
    times = [time + instance.time[instance.number(lane, 0, B)] for lane, time in enumerate(times)]
    return max(sum(times[lane] for lane in lanes) for lanes in instance.lanes_of)


def _gains(instance: Instance) -> bool:
    """Whether overlapping saves time at all."""
    return any(gain > 0 for row in instance.gain for gain in row)


def _delay(rng: Random, instance: Instance) -> float:
    return rng.choice((0.0, 0.25, 0.5, 1.0, 2.0)) * rng.choice((1.0, rng.random())) * _mean(instance, I)


def _mean(instance: Instance, kind: int) -> float:
    """What an F, I or W takes on average."""
    return sum(instance.time[instance.number(lane, 0, kind)] for lane in range(instance.num_lanes)) / (
        instance.num_lanes
    )
