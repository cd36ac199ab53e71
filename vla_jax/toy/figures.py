"""Pictures of a toy: samples, the way to them, the learned field beside the exact one, errors, guidance.

Every function returns a matplotlib figure; `sim.figures.style.save` writes it.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vla_jax.flow.base import Samples
from vla_jax.flow.config import Method
from vla_jax.flow.schedules import CondOT
from vla_jax.sim.figures.style import FAINT, INK, PALETTE, new_figure, tidy
from vla_jax.toy.laws import Law, field
from vla_jax.toy.measure import Guidance, Quality, TimeError, support_level
from vla_jax.toy.train import Trained


def _plane(axes: Axes, extent: float, title: str) -> None:
    """A square of the plane."""
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def _grid(extent: float, side: int) -> tuple[Float[np.ndarray, " side"], Float[jnp.ndarray, "n 2"]]:
    line = np.linspace(-extent, extent, side, dtype=np.float32)
    return line, jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))


def _visits(law: Law, t: float, extent: float) -> Float[np.ndarray, " n"]:
    """How many of 40,000 x_t fall near each point of a grid of 64 x 64."""
    x = t * law.sample(jax.random.key(3), 40_000).x + (1 - t) * jax.random.normal(
        jax.random.key(4), (40_000, 2)
    )
    edges = [[-extent, extent]] * 2
    counts, *_ = np.histogram2d(*np.asarray(x).T[::-1], bins=32, range=edges)
    return np.kron(counts, np.ones((2, 2))).reshape(-1)


def draw_samples(law: Law, rows: dict[str, Float[np.ndarray, "n 2"]], title: str) -> Figure:
    """Exact density, then a scatter of samples for each entry of `rows`, coloured by whether data are there."""
    figure = new_figure(3.6 * (1 + len(rows)), 4.2, title)
    axes = figure.subplots(1, 1 + len(rows), squeeze=False)[0]
    line, points = _grid(law.extent, 200)
    density = np.exp(np.asarray(law.log_prob(points))).reshape(200, 200)
    axes[0].pcolormesh(line, line, density, cmap="Blues", shading="nearest", rasterized=True)
    _plane(axes[0], law.extent, "data: exact density")
    for ax, (name, x) in zip(axes[1:], rows.items()):
        inside = np.asarray(jax.jit(law.log_prob)(jnp.asarray(x))) >= support_level(law)
        for chosen, colour in ((inside, PALETTE[0]), (~inside, PALETTE[1])):
            ax.scatter(*x[chosen].T, s=2, color=colour, linewidths=0, rasterized=True)
        _plane(ax, law.extent, name)
        ax.text(
            0.02, 0.02, f"{100 * inside.mean():.1f} % in support", transform=ax.transAxes, fontsize=10, color=INK
        )  # fmt: skip
    return figure


def draw_trajectories(law: Law, samples: Samples, title: str, *, lines: int = 150) -> Figure:
    """The samples at five times, and how some of them went."""
    path = np.asarray(samples.trajectory)
    last = len(path) - 1
    shown = [round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    figure = new_figure(16, 3.4, title)
    axes = figure.subplots(1, 6)
    for ax, i in zip(axes, shown):
        ax.scatter(*path[i].T, s=1.5, color=PALETTE[0], linewidths=0, rasterized=True)
        _plane(ax, law.extent, f"t = {i / last:.2f}")
    axes[-1].plot(path[:, :lines, 0], path[:, :lines, 1], color=FAINT, linewidth=0.4, alpha=0.7)
    axes[-1].scatter(*path[0, :lines].T, s=4, color=PALETTE[1], zorder=2)
    axes[-1].scatter(*path[-1, :lines].T, s=4, color=PALETTE[0], zorder=3)
    _plane(axes[-1], law.extent, "noise to data")
    return figure


def draw_field(trained: Trained, title: str, times: Sequence[float] = (0.1, 0.5, 0.8, 0.95)) -> Figure:
    """Velocity on the straight path: learned, exact and their distance, where x_t is likely."""
    law = trained.law
    path = field(law, CondOT(), "velocity")
    figure = new_figure(3.1 * len(times) + 0.7, 9.2, title)
    axes = figure.subplots(3, len(times), squeeze=False)
    for column, t in enumerate(times):
        extent = t * law.extent + (1 - t) * 3.0
        line, points = _grid(extent, 64)
        clock = jnp.full(len(points), t)
        exact, learned = (np.asarray(jax.jit(f)(points, clock)) for f in (path, trained.velocity))
        seen = _visits(law, t, extent)
        likely = seen >= 3
        size = np.linalg.norm(exact, axis=1)[likely].max()
        for row, (name, v) in enumerate((("learned", learned), ("exact", exact))):
            ax = axes[row, column]
            speed = np.where(likely, np.linalg.norm(v, axis=1), np.nan).reshape(64, 64)
            ax.pcolormesh(
                line, line, speed, cmap="viridis", vmin=0, vmax=size, shading="nearest", rasterized=True
            )
            pick = likely.reshape(64, 64)[2::4, 2::4].reshape(-1)
            arrows = [a.reshape(64, 64, 2)[2::4, 2::4].reshape(-1, 2)[pick] for a in (np.asarray(points), v)]
            ax.quiver(*arrows[0].T, *arrows[1].T, color="white", scale=size * 16, width=0.005)
            _plane(ax, extent, f"{name}, t = {t:g}")
        error = np.linalg.norm(learned - exact, axis=1)
        mean = np.average(error, weights=seen)
        error = np.where(likely, error, np.nan).reshape(64, 64)
        drawn = axes[2, column].pcolormesh(
            line, line, error, cmap="magma", vmin=0, vmax=size / 4, shading="nearest", rasterized=True
        )
        _plane(axes[2, column], extent, f"distance, mean {mean:.3f}")
        figure.colorbar(drawn, ax=axes[2, column], orientation="horizontal", shrink=0.9, pad=0.02)
    return figure


def draw_errors(
    curves: Mapping[Method, Sequence[Quality]],
    losses: Float[np.ndarray, " steps"],
    by_time: TimeError | None,
    noise: float,
    title: str,
) -> Figure:
    """Energy distance against evaluations; the loss while training; loss and error at every time.

    noise: what two sets of data differ by; less cannot be told apart.
    """
    figure = new_figure(15 if by_time else 10, 4.2, title)
    axes = figure.subplots(1, 3 if by_time else 2)
    for colour, (name, curve) in zip(PALETTE, curves.items()):
        distance = [max(q.energy_distance, noise) for q in curve]
        axes[0].plot([q.nfe for q in curve], distance, "o-", color=colour, label=name)
    axes[0].axhline(noise, color=FAINT, linestyle=":", label="two sets of data")
    axes[0].set(xscale="log", yscale="log")
    tidy(
        axes[0],
        xlabel="evaluations of the network",
        ylabel="energy distance to data",
        title="Error against N",
    )
    axes[0].legend(frameon=False)
    window = max(1, len(losses) // 200)
    smooth = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
    axes[1].plot((np.arange(len(smooth)) + 0.5) * window, smooth, color=PALETTE[0])
    tidy(axes[1], xlabel="step", ylabel="loss", title="Training")
    if by_time:
        axes[2].plot(by_time.t, by_time.loss, color=PALETTE[0], label="training loss")
        axes[2].plot(by_time.t, by_time.floor, "--", color=PALETTE[1], label="the same of a perfect network")
        axes[2].plot(by_time.t, by_time.error, color=PALETTE[2], label="squared distance to the perfect one")
        axes[2].set_yscale("log")
        tidy(
            axes[2], xlabel="t (0 noise, 1 data)", ylabel="mean square per axis", title="At every noise level"
        )
        axes[2].legend(frameon=False)
    return figure


def draw_guidance(
    law: Law, measured: Guidance, samples: list[Float[np.ndarray, "c n 2"]], title: str
) -> Figure:
    """Samples of all classes for some scales, and what becomes of them as the scale grows."""
    figure = new_figure(15, 7.6, title)
    top, bottom = np.asarray(figure.subfigures(2, 1))
    shown = [i for i, w in enumerate(measured.w) if w in (0, 1, 2, 3, 5)]
    for ax, i in zip(np.atleast_1d(top.subplots(1, len(shown))), shown):
        for c, x in enumerate(samples[i]):
            ax.scatter(*x.T, s=1.5, color=PALETTE[c % len(PALETTE)], linewidths=0, rasterized=True)
        _plane(ax, 1.3 * law.extent, f"w = {measured.w[i]:g}")
    panels = (
        ("std of a class / data", measured.std, "Variety"),
        ("share", measured.own_class, "Nearest to its own class"),
        ("share", measured.out_of_bounds, "Out of the data's bounds"),
        ("energy distance", measured.energy_distance, "Distance to data of the class"),
    )
    for ax, (ylabel, values, name) in zip(bottom.subplots(1, 4), panels):
        ax.plot(measured.w, values, "o-", color=PALETTE[0])
        ax.axvline(1, color=FAINT, linewidth=0.8, linestyle=":")
        ax.set_ylim(bottom=0)
        tidy(ax, xlabel="guidance scale w", ylabel=ylabel, title=name)
    return figure
