"""The picture of launch.benchmark: error against latency, and where the time goes beside the roofline."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vla_jax.sim.figures import style

PARTS = {"vision": 0, "prefill": 2, "denoise": 1, "overhead": None}
"""Part → its colour in the palette; None: grey."""


def draw(report: dict[str, Any], path: Path) -> Path:
    """Writes the picture; returns where."""
    rows = report["cases"]
    fronts = [row for row in rows if row.get("error")]
    columns = 1 + bool(fronts)
    title = (
        f"{report['what']}: {report['parameters'] / 1e6:.4g} M parameters, {report['dtype']}, "
        f"{report['devices']} × {report['device']}"
    )
    figure = style.new_figure(6.4 * columns, max(4.2, 0.34 * len(rows) + 2.2), title)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if fronts:
        _front(axes[0], fronts)
    _bars(axes[-1], rows)
    return style.save(figure, path)


def _front(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One line per solver at the first batch size and number of cameras."""
    first = (rows[0]["batch"], rows[0]["cameras"])
    rows = [row for row in rows if (row["batch"], row["cameras"]) == first]
    for colour, method in zip(style.PALETTE, dict.fromkeys(row["solver"] for row in rows)):
        mine = sorted((row for row in rows if row["solver"] == method), key=lambda row: row["num_steps"])
        ms, errors = [row["ms"]["p50"] for row in mine], [row["error"] for row in mine]
        axes.plot(ms, errors, marker="o", label=method, color=colour)
        for row, x, y in zip(mine, ms, errors):
            axes.annotate(
                str(row["num_steps"]), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9
            )
    axes.set(yscale="log")
    style.tidy(
        axes,
        xlabel=f"median latency (ms), batch {first[0]}, {first[1]} cameras",
        ylabel="relative error of the chunk",
        title="Speed and accuracy; numbers are solver steps",
    )
    axes.legend(frameon=False)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Each case's parts in a row, per observation; a black mark where the roofline is."""
    y = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for name, colour in PARTS.items():
        width = np.array([max(row["ms"][name], 0) / row["batch"] for row in rows])
        shade = "#b0b0b0" if colour is None else style.PALETTE[colour]
        axes.barh(y, width, left=left, color=shade, label=name, height=0.7)
        left += width
    for place, row in zip(y, rows):
        if row["roofline"] is not None:
            bound = row["roofline"]["ms"]["total"] / row["batch"]
            axes.plot([bound, bound], [place - 0.4, place + 0.4], color=style.INK, linewidth=2)
    axes.plot([], [], color=style.INK, linewidth=2, label="roofline")
    style.tidy(axes, xlabel="ms per observation", title="Where the time goes")
    axes.set_yticks(
        y, [f"{r['batch']} × {r['cameras']} cam, {r['solver']} {r['num_steps']}" for r in rows], fontsize=9
    )
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize=9)
