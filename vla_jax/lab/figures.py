"""The pictures of a sweep's report. Each takes settings or rows and returns a figure, or None where it has no data."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from vla_jax.files import read_lines
from vla_jax.lab.columns import loss_column, losses_of, terms_of
from vla_jax.lab.front import Verdict, Verdicts, pareto
from vla_jax.lab.table import Mean, Row, Setting, others_varied
from vla_jax.sim.figures import style
from vla_jax.sim.figures.curves import curve, smooth

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
TITLES = {
    "ce": "text loss (CE per token)",
    "action_loss": "action loss",
    "text_accuracy": "text accuracy",
    "success": "success",
    "swapped_success": "follows a swapped instruction",
    "plan_accuracy": "plan names the right object",
    "diversity": "diversity of chunks",
}


def title_of(name: str) -> str:
    """A column for people."""
    return TITLES.get(name, name.replace("_", " "))


GREY = "#8a8a8a"


def draw_front(settings: Sequence[Setting]) -> Figure | None:
    """Every two losses, and text accuracy against success: a line through the fixed λ of each κ, policies as marks.
    Bars are 95 % intervals over seeds."""
    pairs = [(x, y, True) for x, y in itertools.combinations(losses_of(settings), 2)]
    pairs.append(("text_accuracy", "success", False))
    pairs = [pair for pair in pairs if any(s.mean(pair[0]) and s.mean(pair[1]) for s in settings)]
    if not pairs:
        return None
    figure = style.new_figure(6.2 * len(pairs), 5.4, "What is given up for what")
    grid = np.atleast_1d(figure.subplots(1, len(pairs)))
    for axes, (x, y, log) in zip(grid, pairs):
        _front_panel(axes, settings, x, y, log)
    handles, labels = unique_legend(grid)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9.5)
    return figure


def _front_panel(axes: Axes, settings: Sequence[Setting], x: str, y: str, log: bool) -> None:
    for number, (kappa, line) in enumerate(_fixed_lines(settings, x, y)):
        colour = style.PALETTE[number % len(style.PALETTE)]
        means = [(s.known(x), s.known(y)) for s in line]
        _cross(axes, means, colour)
        places = np.array([(a.mean, b.mean) for a, b in means])
        axes.plot(*places.T, color=colour, marker="o", ms=4, mfc="white", linewidth=1.4, zorder=2)
        efficient = places[pareto(places if log else -places)]
        axes.plot(
            *efficient.T,
            color=colour,
            marker="o",
            ms=6.5,
            linestyle="none",
            zorder=3,
            label=f"fixed λ, κ = {kappa:g}",
        )
        for s, (a, b) in zip(line, means):
            text = f"{s.weight:g}"
            axes.annotate(
                text, (a.mean, b.mean), xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour
            )
    for number, setting in enumerate(s for s in settings if s.policy != "fixed"):
        a, b = setting.mean(x), setting.mean(y)
        if a is None or b is None:
            continue
        _cross(axes, [(a, b)], style.INK)
        axes.plot(
            [a.mean],
            [b.mean],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            ms=7.5,
            mfc="white",
            mec=style.INK,
            mew=1.3,
            label=_policy_name(setting),
        )
    text_only = [s for s in settings if s.weight == 0 and s.mean(x)]
    if text_only:
        axes.axvline(
            text_only[0].known(x).mean, color=GREY, linestyle=":", label=f"{text_only[0].symbol} = 0"
        )
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    shown = [s for s in settings if s.mean(x) and s.mean(y)]
    _keep_to_values(axes.set_xlim, [s.known(x) for s in shown])
    _keep_to_values(axes.set_ylim, [s.known(y) for s in shown])
    if log:
        _plain_ticks(axes)
    title = f"{'small' if log else 'large'} is good; filled: no λ of its κ is better in both"
    style.tidy(axes, xlabel=title_of(x), ylabel=title_of(y), title=title)


def draw_lambda(settings: Sequence[Setting]) -> Figure | None:
    """Every metric as a function of λ, one line per κ, bands over seeds."""
    losses = losses_of(settings)
    columns = dict.fromkeys([*losses, *TITLES])
    names = [n for n in columns if any(len(line) > 1 for _, line in _fixed_lines(settings, n, n))]
    if not names:
        return None
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = style.new_figure(3.5 * columns, 2.9 * rows + 0.7, "Fixed λ: mean and 95 % interval over seeds")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid, names):
        for number, (kappa, line) in enumerate(_fixed_lines(settings, name, name)):
            colour = style.PALETTE[number % len(style.PALETTE)]
            means = [s.known(name) for s in line]
            weights = [s.weight for s in line]
            axes.fill_between(
                weights,
                [m.low for m in means],
                [m.high for m in means],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                weights,
                [m.mean for m in means],
                color=colour,
                marker="o",
                ms=3,
                linewidth=1.4,
                label=f"κ = {kappa:g}",
            )
        shown = [s.known(name) for _, line in _fixed_lines(settings, name, name) for s in line]
        _keep_to_values(axes.set_ylim, shown)
        axes.set_xscale("log")
        if name in losses:
            axes.set_yscale("log")
            _plain_ticks(axes, x=False)
        style.tidy(axes, xlabel=settings[0].symbol, title=title_of(name))
    handles, labels = unique_legend(grid)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_policies(verdicts: Verdicts | None) -> Figure | None:
    """Hypervolume and regret of every policy and every fixed λ, with intervals."""
    if verdicts is None or not verdicts.policies:
        return None
    lines = [*sorted(verdicts.policies, key=by_regret), *verdicts.fixed]
    labels = [
        _policy_name(v.setting) if v.setting.policy != "fixed" else f"fixed λ = {v.setting.weight:g}"
        for v in lines
    ]
    panels: list[tuple[str, Callable]] = [
        ("hypervolume of its point\n(large is good)", lambda v: v.hypervolume),
        (f"regret against λ = {verdicts.best.weight:g}\n(small is good)", lambda v: v.regret),
    ]
    if verdicts.most_successful:
        best = verdicts.most_successful.weight
        panels.append((f"success lost against λ = {best:g}\n(small is good)", lambda v: v.success_regret))
    figure = style.new_figure(
        4.1 * len(panels) + 0.8, 0.27 * len(lines) + 1.8, "Policies beside the fixed λ (log losses)"
    )
    for number, (axes, (title, take)) in enumerate(zip(figure.subplots(1, len(panels), sharey=True), panels)):
        for row, verdict in enumerate(lines):
            found = take(verdict)
            if found is None:
                continue
            colour = style.PALETTE[1] if verdict.setting.policy != "fixed" else style.PALETTE[0]
            axes.plot([found.low, found.high], [row, row], color=colour, linewidth=1.4)
            axes.plot(list(found.values), [row] * len(found.values), ".", color=colour, alpha=0.35, ms=5)
            axes.plot([found.mean], [row], "o", color=colour, ms=5)
        if number:
            axes.axvline(0, color=GREY, linewidth=1)
        else:
            if verdicts.front:
                axes.axvline(verdicts.front.mean, color=GREY, linestyle=":", linewidth=1.4)
            axes.set_yticks(range(len(lines)), labels)
            axes.invert_yaxis()
        _limit_x(axes, [take(v) for v in lines])
        style.tidy(axes, title=title)
    return figure


def draw_by_time(settings: Sequence[Setting]) -> Figure | None:
    """The validation action loss by bin of flow time, one line per fixed λ; one panel per κ."""
    lines = [(k, [s for s in line if s.rows[0].by_time()]) for k, line in _fixed_lines(settings, "ce", "ce")]
    lines = [(kappa, line) for kappa, line in lines if line]
    if not lines:
        return None
    figure = style.new_figure(4.3 * len(lines), 4.2, "Held-out action loss by flow time, mean over seeds")
    grid = np.atleast_1d(figure.subplots(1, len(lines), sharey=True))
    for axes, (kappa, line) in zip(grid, lines):
        for number, setting in enumerate(line):
            by_time = np.mean([row.by_time() for row in setting.rows], axis=0)
            shade = number / max(len(line) - 1, 1)
            x = (np.arange(len(by_time)) + 0.5) / len(by_time)
            axes.plot(
                x, by_time, color=_shade(shade), label=f"{setting.symbol} = {setting.weight:g}", linewidth=1.5
            )
        style.tidy(axes, xlabel="flow time t (0 noise, 1 data)", title=f"κ = {kappa:g}")
    handles, labels = unique_legend(grid)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_curves(rows: Sequence[Row]) -> Figure | None:
    """Training and validation losses of some rows."""
    chosen = some_rows(rows)
    figure = style.new_figure(
        5.5 * len(terms_of(rows)),
        4.6,
        f"Training (lines) and held-out (marks) losses, seed {chosen[0].config.seed}",
    )
    terms = terms_of(rows)
    grid = np.atleast_1d(figure.subplots(1, len(terms)))
    for number, row in enumerate(chosen):
        lines = logged(row.folder)
        drawn = look_of(number, row)
        for axes, key in zip(grid, (f"{name}_loss" for name in terms)):
            steps, values = curve(lines, key)
            axes.plot(steps, smooth(values, max(1, len(values) // 20)), **drawn)
            axes.plot(
                *curve(lines, f"val/{key}"),
                linestyle="none",
                marker="o",
                ms=4,
                mfc="white",
                color=drawn["color"],
            )
    for axes, name in zip(grid, terms):
        axes.set_yscale("log")
        _plain_ticks(axes, x=False)
        style.tidy(axes, xlabel="step", title=title_of(loss_column(name)))
    handles, labels = unique_legend(grid)
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9.5)
    return figure


def _fixed_lines(settings: Sequence[Setting], x: str, y: str) -> list[tuple[float, list[Setting]]]:
    """κ → its fixed λ > 0 in order, where both metrics exist."""
    found = [s for s in settings if s.policy == "fixed" and s.weight > 0 and s.mean(x) and s.mean(y)]
    kappas = sorted({s.kappa for s in found}, reverse=True)
    return [(k, sorted((s for s in found if s.kappa == k), key=lambda s: s.weight)) for k in kappas]


def some_rows(rows: Sequence[Row], fixed: int = 4) -> list[Row]:
    """The first seed of a few fixed λ > 0, evenly spread, and of every other policy, at the largest κ."""
    seed, kappa = min(r.config.seed for r in rows), max(r.kappa for r in rows)
    own = [r for r in rows if r.config.seed == seed and r.kappa == kappa and r.weight > 0]
    constant = sorted((r for r in own if r.policy == "fixed"), key=lambda r: r.weight)
    places = np.unique(np.linspace(0, len(constant) - 1, min(fixed, len(constant))).round().astype(int))
    return [constant[i] for i in places] + [r for r in own if r.policy != "fixed"] or list(rows[:1])


def look_of(number: int, row: Row) -> dict[str, Any]:
    """A line's colour and style: fixed λ are shades of one colour, policies have their own, dashed."""
    if row.policy == "fixed":
        shade = (np.log10(row.weight) + 2) / 4
        return {
            "color": _shade(float(np.clip(shade, 0, 1))),
            "linewidth": 1.7,
            "label": f"{row.symbol} = {row.weight:g}",
        }
    colour = style.PALETTE[(number + 1) % len(style.PALETTE)]
    dashes = ("--", "-.", ":")[number // len(style.PALETTE) % 3]
    return {"color": colour, "linestyle": dashes, "linewidth": 1.2, "label": _name(row)}


def _shade(share: float) -> tuple[float, float, float]:
    """From light to dark blue."""
    light, dark = np.array([0.68, 0.83, 0.93]), np.array([0.02, 0.15, 0.35])
    return tuple(light + share * (dark - light))


def by_regret(verdict: Verdict) -> float:
    """For sorting: those without a regret come last."""
    return verdict.regret.mean if verdict.regret else float("inf")


def _policy_name(setting: Setting) -> str:
    return _name(setting.rows[0])


def _name(row: Row) -> str:
    """A policy with its scale and with whatever options of it were varied."""
    name = row.policy if row.weight == 1 else f"{row.policy} × {row.weight:g}"
    return " ".join([name, *others_varied(row)])


def _cross(axes: Axes, means: Sequence[tuple[Mean, Mean]], colour: str) -> None:
    """Intervals in both directions."""
    for a, b in means:
        axes.plot([a.low, a.high], [b.mean, b.mean], color=colour, alpha=0.35, linewidth=1)
        axes.plot([a.mean, a.mean], [b.low, b.high], color=colour, alpha=0.35, linewidth=1)


def _keep_to_values(set_limits: Callable[[float, float], Any], means: Sequence[Mean]) -> None:
    """Limits that show all seeds; wide intervals of few seeds are cut off."""
    values = [v for m in means for v in m.values]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1
    set_limits(low - margin if low - margin > 0 or low <= 0 else low * 0.95, high + margin)


def _limit_x(axes: Axes, means: Sequence[Mean | None]) -> None:
    values = [v for m in means if m for v in m.values]
    margin = 0.1 * (max(values) - min(values)) or 0.1
    axes.set_xlim(min(values) - margin, max(values) + margin)


def _plain_ticks(axes: Axes, x: bool = True) -> None:
    """Numbers as people write them on logarithmic axes."""
    for axis in (axes.xaxis, axes.yaxis) if x else (axes.yaxis,):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = axis.get_view_interval()
        if high < 4 * low:  # hardly a power of ten in sight
            axis.set_major_locator(MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
            continue
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
        axis.set_tick_params(which="minor", labelsize=8, labelcolor=style.FAINT)


def unique_legend(grid: Iterable[Axes]) -> tuple[list[Artist], list[str]]:
    """The lines of all panels, each label once."""
    found: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines that a cell has logged while it was trained."""
    return read_lines(folder / "metrics.jsonl")
