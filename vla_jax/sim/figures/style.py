"""One look for all pictures: colours that colour-blind readers tell apart, sizes, and how a figure is saved.

Figures are made with matplotlib's objects (no pyplot): drawing has no global state and needs no display.
"""

import os
import pathlib
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), without its yellow, which is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SUCCESS, FAILURE = "#009E73", "#D55E00"
INK, FAINT = "#222222", "#6b6b6b"

FONT_SIZES: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "figure.titlesize": 14,
    "legend.fontsize": 10.5,
}


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure, size in inches, with a bold title at its left edge."""
    with rc_context(FONT_SIZES):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    return figure


def tidy(axes: Axes, *, xlabel: str = "", ylabel: str = "", title: str = "") -> None:
    """Labels, no box at the top and right, a light grid behind the data."""
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(xlabel, fontsize=11, color=FAINT)
    axes.set_ylabel(ylabel, fontsize=11, color=FAINT)
    axes.tick_params(labelsize=10, colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike, dpi: int = 110) -> pathlib.Path:
    """Writes a PNG in one move (a half-written picture is never seen) and returns its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=dpi, format="png")
    part.replace(path)
    return path
