"""A contact sheet: one row per episode, frames in time from left to right, the outcome as its border."""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from vla_jax.sim.figures import style


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """One episode's pictures."""

    frames: Sequence[UInt8[np.ndarray, "h w 3"]]
    seconds: Sequence[float]
    """Time of each frame."""
    success: bool
    outcome: str
    """What happened in a word or two, e.g. ``reached``, ``collision``, ``time out``."""
    instruction: str
    plan: str | None = None


def draw_sheet(films: Sequence[Film], *, title: str, columns: int = 6) -> Figure:
    """Each film as one row of `columns` frames, evenly spread from its first to its last."""
    size = 1.35
    figure = style.new_figure(2.9 + size * columns, (size + 0.28) * len(films) + 0.55, title)
    grid = figure.subplots(len(films), columns + 1, squeeze=False, width_ratios=[2.0] + [1.0] * columns)
    for row, film in zip(grid, films, strict=True):
        colour = style.SUCCESS if film.success else style.FAILURE
        _describe(row[0], film, colour)
        chosen = np.unique(np.linspace(0, len(film.frames) - 1, columns).round().astype(int))
        for axes in row[1 + len(chosen) :]:
            axes.axis("off")
        for axes, index in zip(row[1:], chosen):
            axes.imshow(film.frames[index], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=colour, linewidth=2.6)
            axes.set_title(f"{film.seconds[index]:.1f} s", fontsize=9.5, color=style.FAINT, pad=3)
    return figure


def _describe(axes, film: Film, colour: str) -> None:
    """Writes outcome, instruction and plan into the row's first cell."""
    axes.axis("off")
    mark = "✓" if film.success else "✗"
    axes.text(0, 0.97, f"{mark} {film.outcome}", color=colour, fontsize=11.5, fontweight="bold", va="top")
    lines = textwrap.fill(f"“{film.instruction}”", 28, max_lines=3)
    axes.text(0, 0.76, lines, color=style.INK, fontsize=10.5, va="top", linespacing=1.15)
    if film.plan:
        below = 0.76 - 0.17 * (lines.count("\n") + 1) - 0.03
        text = textwrap.fill(f"plan: {film.plan}", 32, max_lines=3)
        axes.text(0, below, text, color=style.FAINT, fontsize=9.5, va="top", linespacing=1.15)
