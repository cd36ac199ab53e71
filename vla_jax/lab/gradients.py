"""The pictures of what a sweep's diagnostics say of the losses' gradients."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vla_jax.lab.columns import terms_of
from vla_jax.lab.figures import GREY, logged, look_of, some_rows, unique_legend
from vla_jax.lab.table import Row
from vla_jax.objectives.diagnostics import UNNAMED, pair_name
from vla_jax.sim.figures import style
from vla_jax.sim.figures.curves import curve, smooth


def draw_all(rows: Sequence[Row]) -> dict[str, Figure | None]:
    """``gradients`` of text and actions, ``gradients:FIRST:SECOND`` of every other two losses."""
    pairs = itertools.combinations(terms_of(rows), 2)
    return {
        "gradients" if pair == UNNAMED else f"gradients:{pair[0]}:{pair[1]}": draw(rows, pair)
        for pair in pairs
    }


def draw(rows: Sequence[Row], pair: tuple[str, str] = UNNAMED) -> Figure | None:
    """λ_eff and cosine over training, by layer and, where one of the two has it, by flow time. Of one seed, for a few
    fixed λ and for the policies."""
    ratio, cosine = names = tuple(pair_name(name, pair) for name in ("ratio", "cosine"))
    chosen = [(row, _diagnosed(row, cosine)) for row in some_rows(rows)]
    chosen = [(row, lines) for row, lines in chosen if lines]
    if not chosen:
        return None
    first, second = pair
    said = f"λ_eff = ‖λ g_{second}‖ / ‖λ g_{first}‖"
    seed = chosen[0][0].config.seed
    figure = style.new_figure(13.5, 7.2, f"The two gradients on the trunk, seed {seed}; {said}")
    grid = figure.subplots(2, 3)
    for number, (row, lines) in enumerate(chosen):
        drawn = look_of(number, row)
        for axes, name in zip(grid[:, 0], names):
            steps, values = curve(lines, f"diagnostics/{name}")
            axes.plot(steps, smooth(values, max(1, len(values) // 12)), **drawn)
        late = lines[len(lines) // 2 :]
        layers = _by_layer(late, names)
        for axes, name in zip(grid[:, 1], names):
            values = np.array([v[name] for v in layers.values()])
            if name == ratio:  # a layer without a gradient of the second loss has no place on a log axis
                values = np.where(values > 0, values, np.nan)
            axes.plot(range(len(layers)), values, marker="o", ms=3, **drawn)
            axes.set_xticks(range(len(layers)), list(layers), rotation=35, ha="right", fontsize=8)
        for axes, name in zip(grid[:, 2], names):
            if f"diagnostics/{name}_by_time" not in late[0]:
                axes.set_visible(False)
                continue
            by_time = np.array([line[f"diagnostics/{name}_by_time"] for line in late], float)
            bins = by_time.shape[1]
            axes.plot((np.arange(bins) + 0.5) / bins, np.nanmean(by_time, axis=0), **drawn)
    _label_gradients(grid)
    handles, labels = unique_legend(grid.ravel())
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9.5)
    return figure


def _label_gradients(grid: np.ndarray) -> None:
    """Axes and titles of `draw`."""
    for column, label in enumerate(("step", "", "flow time t (0 noise, 1 data)")):
        where = ("over training", "by layer, second half", "by flow time, second half")[column]
        style.tidy(grid[0, column], xlabel=label, title=f"λ_eff {where}")
        style.tidy(grid[1, column], xlabel=label, title=f"cosine {where}")
        grid[0, column].set_yscale("log")
        grid[1, column].axhline(0, color=GREY, linewidth=1)
        for axes in grid[:, 1]:
            axes.tick_params(axis="x", labelsize=8)


def _diagnosed(row: Row, cosine: str) -> list[dict[str, Any]]:
    """The lines of a row's log that compare two gradients, by the name of their cosine."""
    return [line for line in logged(row.folder) if line.get(f"diagnostics/{cosine}") is not None]


def _by_layer(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Layer → means by name (ratio and cosine of two losses); stacked groups are taken apart."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        ending = f"/{name}"
        for key in lines[0]:
            path = key.removeprefix("diagnostics/")
            of_a_bin = path.split("/")[0][1:].isdigit()
            if path == key or not path.endswith(ending) or of_a_bin:
                continue
            values = np.array([np.atleast_1d(np.array(line[key], float)) for line in lines])
            group = (
                path.removesuffix(ending)
                .removeprefix("backbone/")
                .replace("Transformer/encoderblock", "block")
            )
            for i, value in enumerate(_mean_of_known(values)):
                label = f"{group} {i}" if values.shape[1] > 1 else group
                found.setdefault(label, {})[name] = float(value)
    return dict(sorted(found.items()))


def _mean_of_known(values: Float[np.ndarray, "lines n"]) -> Float[np.ndarray, " n"]:
    """The mean over lines of what is not NaN; NaN where nothing else is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
