"""A fan of chunks sampled for one observation, drawn over the scene: does a policy keep both ways open?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from vla_jax.sim.figures import style


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fan:
    """The chunks of one policy in one scene."""

    label: str
    """The policy's name, e.g. ``flow``."""
    image: UInt8[np.ndarray, "h w 3"]
    paths: Float[np.ndarray, "S k1 2"]
    """One path per sample, as (x, y) in pixels of `image`, beginning where the gripper is."""
    caption: str = ""
    """A line below the picture."""


def draw_fans(rows: Sequence[Sequence[Fan]], *, title: str, row_titles: Sequence[str] = ()) -> Figure:
    """A grid of fans, such as one row per scene and one column per policy. A policy keeps its colour."""
    columns = len(rows[0])
    labels = list(dict.fromkeys(fan.label for row in rows for fan in row))
    figure = style.new_figure(3.9 * columns, 4.6 * len(rows) + 0.4, title)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.08)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for r, row in enumerate(rows):
        for c, fan in enumerate(row):
            _draw_fan(grid[r, c], fan, style.PALETTE[labels.index(fan.label) % len(style.PALETTE)])
            equal = ", all equal" if np.ptp(fan.paths, axis=0).max() < 1e-3 else ""
            name = f"{fan.label} · {len(fan.paths)} samples{equal}"
            grid[r, c].set_title(name, loc="left", fontsize=12, color=style.INK)
        if row_titles:
            grid[r, 0].set_ylabel(row_titles[r], fontsize=11, color=style.FAINT)
    return figure


def _draw_fan(axes: Axes, fan: Fan, colour: str) -> None:
    height, width = fan.image.shape[:2]
    # Pixel (row i, column j) covers [j, j+1] × [i, i+1]: coordinates are lengths from the upper left corner.
    axes.imshow(fan.image, extent=(0, width, height, 0), interpolation="nearest")
    for path in fan.paths:
        (line,) = axes.plot(*path.T, color=colour, linewidth=1.6, alpha=0.75, solid_capstyle="round")
        line.set_path_effects([Stroke(linewidth=3.0, foreground="white", alpha=0.35), Normal()])
    ends = fan.paths[:, -1]
    axes.scatter(*ends.T, s=22, color=colour, edgecolors="white", linewidths=0.8, zorder=3)
    axes.scatter(*fan.paths[0, 0], s=60, color="white", edgecolors=style.INK, linewidths=1.4, zorder=4)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_color("#bbbbbb")
    if fan.caption:
        axes.set_xlabel(fan.caption, fontsize=10.5, color=style.INK)
