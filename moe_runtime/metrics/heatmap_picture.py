"""The load of every expert at one step as a picture: a row for each MoE layer, a column for each expert.

Colours go by the logarithm of the load: a fair share is near white, half of it as blue as double of it is
red, and an expert with less than 1% of a fair share is black, so that a dead one shows among many. Red and
blue are told apart in all common forms of colour blindness. Cells are whole pixels: nothing is blurred away.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

DEAD_SHARE = 0.01
# Load as a power of two of the fair share, and its colour.
_STOPS = (
    (-3.0, (5, 48, 97)),
    (-1.0, (103, 169, 207)),
    (0.0, (247, 247, 247)),
    (1.0, (239, 138, 98)),
    (3.0, (103, 0, 31)),
)
_DEAD, _INK, _GROUND = (0, 0, 0), (34, 34, 34), (255, 255, 255)
_WIDEST, _CELL = 1600, (4, 24)  # pixels: of all cells; of one, at least and at most
_LINE, _GLYPH = 14, 6  # pixels of PIL's own font: from line to line, of one letter
_MARGIN = 8


def draw_heatmap(layers: Sequence[str], load: ArrayLike) -> Image.Image:
    """The picture, with the names of the layers and a scale.

    Args:
        layers: canonical prefixes.
        load: [layers, experts], relative to a fair share.
    """
    table = np.asarray(load, dtype=np.float64)
    cell = int(np.clip(_WIDEST // max(1, table.shape[1]), *_CELL))
    height = max(cell, _LINE)
    cells = np.kron(colours(table), np.ones((height, cell, 1), dtype=np.uint8))
    left = _MARGIN + _GLYPH * max(map(len, layers), default=0) + 6
    top = _MARGIN + _LINE
    width = max(left + cells.shape[1], left + 420) + _MARGIN
    picture = Image.new("RGB", (width, top + cells.shape[0] + 2 * _LINE + 2 * _MARGIN), _GROUND)
    picture.paste(Image.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(layers):
        draw.text((_MARGIN, top + row * height + (height - _LINE) // 2), name, fill=_INK)
    draw.text((left, _MARGIN - 2), f"expert 0 to {table.shape[1] - 1}", fill=_INK)
    _draw_scale(draw, left, top + cells.shape[0] + _MARGIN)
    return picture


def colours(table: NDArray[np.float64]) -> NDArray[np.uint8]:
    """uint8 [layers, experts, 3] of loads relative to a fair share."""
    powers = np.log2(np.maximum(table, 1e-9))
    places = [stop for stop, _ in _STOPS]
    channels = [np.interp(powers, places, [colour[i] for _, colour in _STOPS]) for i in range(3)]
    painted = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    painted[table < DEAD_SHARE] = _DEAD
    return painted


def _draw_scale(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    """A box for each of some loads, and what it stands for."""
    named = ((0.0, "dead"), (0.125, "1/8"), (0.5, "1/2"), (1.0, "fair"), (2.0, "2x"), (8.0, "8x and more"))
    shades = colours(np.array([[load for load, _ in named]]))[0]
    x = left
    for (_, name), shade in zip(named, shades.tolist(), strict=True):
        draw.rectangle((x, top, x + _LINE, top + _LINE), fill=tuple(shade), outline=_INK)
        draw.text((x + _LINE + 5, top + 1), name, fill=_INK)
        x += _LINE + 16 + _GLYPH * len(name) + 8
