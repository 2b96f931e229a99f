"""How a study's arms go over training: a table at a few places, and a picture.

Curves of a result are lists of (tokens, value). The table shows places where every run has a value of its
own: nothing is carried over from an earlier place or drawn in between.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.intervals import mean_interval

CURVES = {
    "violation": "violation of the worse layer, mean over the {stretch:,} tokens before",
    "val_loss": "validation loss, nats a token, over the sequences of `train.eval_sequences`",
    "loss": "training loss, nats a token, mean over the {stretch:,} tokens before",
}
ROWS = 6
Curve = Sequence[Sequence[float]]
Arms = Mapping[str, Sequence[dict[str, Any]]]


def over_time_table(curve: str, arms: Arms) -> str:
    """Markdown: a curve of all arms, means over seeds and half their 95% interval.

    Args:
        curve: a name of `CURVES`.
        arms: results by arm, one a seed.
    """
    having = {
        arm: [dict(map(tuple, points)) for points in curves]
        for arm, found in arms.items()
        if (curves := [one["curves"][curve] for one in found if curve in one["curves"]])
    }
    if not having:
        return f"No run has the curve of {curve} yet."
    shared = sorted(set.intersection(*(set(points) for curves in having.values() for points in curves)))
    if not shared:
        return f"The arms have {curve} at no number of tokens in common."
    places = [shared[row] for row in np.unique(np.linspace(0, len(shared) - 1, ROWS).round().astype(int))]
    said = CURVES[curve].format(stretch=shared[0])
    lines = [f"| tokens ({said}) | {' | '.join(having)} |", f"|{' --- |' * (1 + len(having))}"]
    for tokens in places:
        cells = [_shown([points[tokens] for points in curves]) for curves in having.values()]
        lines.append(f"| {' | '.join([f'{tokens:,}', *cells])} |")
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    found = mean_interval(values)
    return f"{found.mean:.3f}" + (f" ± {found.half:.3f}" if len(values) > 1 else "")


def draw(curves: Sequence[str], arms: Arms, title: str, file: Path) -> None:
    """A picture of curves, one panel each: a line a seed, one colour an arm.

    Args:
        file: .svg, .png or .pdf.

    Raises:
        ConfigError: matplotlib is not there, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot: needs matplotlib; pip install 'moe_runtime[plots]'") from error
    figure = Figure(figsize=(6.4, 3.6 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    for panel, curve in zip(panels, curves, strict=True):
        for number, (arm, results) in enumerate(arms.items()):
            lines = [one["curves"][curve] for one in results if curve in one["curves"]]
            for place, points in enumerate(lines):
                panel.plot(*zip(*points, strict=True), color=f"C{number}", lw=1, label=None if place else arm)
        panel.set(xlabel="tokens", ylabel=CURVES[curve].split(",")[0])
        panel.legend()
    figure.suptitle(title, wrap=True, fontsize="medium")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {file}: cannot be written ({error}); name a .svg, .png or .pdf") from error
