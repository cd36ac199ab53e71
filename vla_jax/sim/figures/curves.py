"""Training curves of one or several runs, from their metrics.jsonl."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla_jax.files import read_lines
from vla_jax.sim.figures import style

Records = Sequence[Mapping[str, Any]]

# title, key of the training curve, key of the validation curve, whether a wide range may be drawn logarithmically
PANELS = (
    ("action loss", "action_loss", "val/action_loss", True),
    ("text loss (CE per token)", "text_loss", "val/text_loss", True),
    ("gradient norm", "grad_norm", None, True),
    ("learning rate", "learning_rate", None, False),
)


def read_metrics(run: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl in order; damaged ones are left out, with a warning. Raises FileNotFoundError."""
    path = pathlib.Path(run) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a run directory that launch.train has written")
    return read_lines(path)


def curve(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite `key`."""
    pairs = [(r["step"], r[key]) for r in records if r.get(key) is not None and np.isfinite(r[key])]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps, float), np.array(values, float)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values; shorter at the ends, so that nothing is invented there."""
    if window <= 1 or len(values) == 0:
        return values
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def draw_curves(runs: Mapping[str, Records], *, title: str) -> Figure:
    """One panel per quantity that any run has, one colour per run; validation as marks on a dashed line."""
    keys = {key for records in runs.values() for record in records for key in record}
    others = sorted(key for key in keys if key.endswith("_loss") and "/" not in key)
    losses = [(key.replace("_", " "), key, f"val/{key}", True) for key in others]
    panels = [*PANELS, *(panel for panel in losses if panel[1] not in {p[1] for p in PANELS})]
    panels = [p for p in panels if any(len(curve(records, p[1])[0]) for records in runs.values())]
    if not panels:
        raise ValueError(f"no run has any of {', '.join(p[1] for p in PANELS)} in its metrics.jsonl")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = style.new_figure(5.2 * columns, 3.1 * rows + 0.4, title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid, panels):
        _draw_panel(axes, runs, *panel)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False, fontsize=10.5)
    return figure


def _draw_panel(
    axes: Axes, runs: Mapping[str, Records], title: str, key: str, val_key: str | None, log: bool
) -> None:
    every = []
    for number, (label, records) in enumerate(runs.items()):
        colour = style.PALETTE[number % len(style.PALETTE)]
        steps, values = curve(records, key)
        every.append(values)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values, max(1, len(values) // 40)), color=colour, linewidth=1.9, label=label)
        if val_key and len(curve(records, val_key)[0]):
            val_label = f"{label}, held-out {curve(records, val_key)[1][-1]:.3g}"
            axes.plot(
                *curve(records, val_key),
                color=colour,
                linestyle="--",
                marker="o",
                ms=5,
                mfc="white",
                label=val_label,
            )
    values = np.concatenate(every)
    if log and len(values) and values.min() > 0 and values.max() / values.min() > 20:
        axes.set_yscale("log")
    style.tidy(axes, xlabel="step", title=title)
