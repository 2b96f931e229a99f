"""How many stages a layout has, and which pipeline rank holds each.

    straight   stage s on rank s                                 single, gpipe, 1f1b, zb1p
    mirrored   the same, and once more from the other end        dualpipe
    v          rank r holds stages r and 2 pp - 1 - r            zbv, dualpipev
    loop       stage s on rank s mod pp                          interleaved

`auto` and `searched` are free to choose: they take the V, whose ranks all hold as much and keep one copy
of the weights, where there are layers enough for two stages a rank, and the straight line otherwise.
`layers_per_stage`, if given, chooses by its length.
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
    if layout.layers_per_stage is not None:
        has_two = len(layout.layers_per_stage) == 2 * layout.pp
    else:
        has_two = num_layers >= 2 * layout.pp
    return "v" if has_two and layout.pp > 1 else "straight"


def num_stages(layout: LayoutConfig, num_layers: int) -> int:
    """Stages of one direction."""
    each = {"straight": 1, "mirrored": 1, "v": 2, "loop": layout.chunks or 2}
    return layout.pp * each[shape_of(layout, num_layers)]


def stage_ranks(layout: LayoutConfig, num_layers: int) -> Placement:
    """`ranks[direction][stage]` is the pipeline rank that holds the stage."""
    ranks = tuple(range(layout.pp))
    match shape_of(layout, num_layers):
        case "mirrored":
            return ranks, ranks[::-1]
        case "v":
            return (ranks + ranks[::-1],)
        case "loop":
            return (ranks * (layout.chunks or 2),)
    return (ranks,)
