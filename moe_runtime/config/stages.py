"""How many stages a layout has, and which pipeline rank holds each.

    straight   stage s on rank s                                 single, gpipe, 1f1b, zb1p
    mirrored   the same, and once more from the other end        dualpipe
    v          rank r holds stages r and 2 pp - 1 - r            zbv, dualpipev
    loop       stage s on rank s mod pp                          interleaved

`auto` and `searched` are free to choose: `layout.chunks` says how many stages each rank holds, 1 in a
straight line, 2 in a V, 4 in two V's one after the other (a W), and so on. Left null it is 2, whose ranks
all hold as much and keep one copy of the weights, where there are layers enough, else 1; or what
`layers_per_stage` says by its length.
"""

from typing import Literal

from moe_runtime.config.schema import LayoutConfig

Shape = Literal["straight", "mirrored", "v", "loop"]
Placement = tuple[tuple[int, ...], ...]

_SHAPES: dict[str, Shape] = {
    "single": "straight",
    "gpipe": "straight",
    "1f1b": "straight",
    "zb1p": "straight",
    "dualpipe": "mirrored",
    "zbv": "v",
    "dualpipev": "v",
    "interleaved": "loop",
}


def shape_of(layout: LayoutConfig, num_layers: int) -> Shape:
    """How the stages of a layout lie on its pipeline ranks."""
    if layout.schedule in _SHAPES:
        return _SHAPES[layout.schedule]
    return "v" if _free_chunks(layout, num_layers) > 1 else "straight"


def _free_chunks(layout: LayoutConfig, num_layers: int) -> int:
    """Stages of each rank where the schedule leaves the choice."""
    if layout.pp == 1:
        return 1
    if layout.chunks is not None:
        return layout.chunks
    if layout.layers_per_stage is not None:
        return 2 if len(layout.layers_per_stage) == 2 * layout.pp else 1
    return 2 if num_layers >= 2 * layout.pp else 1


def num_stages(layout: LayoutConfig, num_layers: int) -> int:
    """Stages of one direction."""
    return len(stage_ranks(layout, num_layers)[0])


def stage_ranks(layout: LayoutConfig, num_layers: int) -> Placement:
    """`ranks[direction][stage]` is the pipeline rank that holds the stage."""
    ranks = tuple(range(layout.pp))
    match shape_of(layout, num_layers):
        case "mirrored":
            return ranks, ranks[::-1]
        case "v":
            is_free = layout.schedule not in _SHAPES
            return ((ranks + ranks[::-1]) * (_free_chunks(layout, num_layers) // 2 if is_free else 1),)
        case "loop":
            return (ranks * (layout.chunks or 2),)
    return (ranks,)
