"""Everything a sweep has to say: report.html, the pictures by themselves, and the numbers as CSV and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vla_jax.files import write_json
from vla_jax.lab import figures, gradients, html
from vla_jax.lab.columns import along_one_axis, columns_of, losses_of
from vla_jax.lab.front import Apart, Verdicts, apart, judge, pareto_settings
from vla_jax.lab.store import Store
from vla_jax.lab.table import (
    Mean,
    Row,
    Setting,
    check_comparable,
    read_rows,
    records,
    settings_of,
    to_csv,
    unfinished,
    where,
)
from vla_jax.sim.figures import style

PERCENT = (
    "text_accuracy", "success", "swapped_success", "plan_accuracy", "forced_plan_followed", "collision",
)  # fmt: skip
SHOWN = ("text_accuracy", "success", "swapped_success", "plan_accuracy", "diversity")
"""Columns beside the losses."""

CAPTIONS = {
    "front": "Left, towards the lower left is better; right, towards the upper right. Numbers beside marks are λ. "
    "Axes keep to the seeds' own values; intervals of few seeds may reach beyond.",
    "lambda": "Axes keep to the seeds' own values; intervals of few seeds may reach beyond.",
    "policies": "Orange: policies, blue: fixed λ; small dots are seeds. Dotted: the hypervolume of all fixed λ "
    "together. u = log loss between the best (0) and the worst (1) fixed λ; cost = mean of both u; regret = cost minus "
    "that of the best fixed λ, paired by seed. The best λ is known only after the sweep.",
    "gradients": "Unclipped gradients on objective.diagnostics.trunk. λ_eff contains the policy's weight, and κ.",
    "by_time": "Ten bins of t.",
    "curves": "",
}
HEADINGS = {
    "front": "Pareto front",
    "lambda": "By λ",
    "policies": "Policies against the best fixed λ",
    "gradients": "Gradients",
    "by_time": "Action loss by flow time",
    "curves": "Loss curves",
}


def write_report(
    folders: Sequence[Path], out: Path, *, prefix: str = "", conditions: Sequence[str] = ()
) -> list[Path]:
    """Writes everything to `out`; returns the files.

    Raises ValueError where there is no finished cell of which the `conditions`, ``FIELD=VALUE``, hold, or where they
    differ in what the figures do not show.
    """
    rows = where(read_rows(folders), conditions)
    check_comparable(rows)
    rows = along_one_axis(rows)
    settings = settings_of(rows)
    verdicts = judge(settings)
    drawn = {name: figure for name, figure in draw_all(rows, settings, verdicts).items() if figure}
    paths = {
        name: style.save(figure, out / f"{prefix}{name.replace(':', '_')}.png")
        for name, figure in drawn.items()
    }
    numbers = summary(rows, settings, verdicts)
    write_json(numbers, out / f"{prefix}results.json")
    (out / f"{prefix}results.csv").write_text(to_csv(records(rows, columns_of(rows))))
    missing = unfinished(folders)
    page = out / f"{prefix}report.html"
    page.write_text(_page(folders, rows, settings, verdicts, paths, missing), encoding="utf-8")
    return [page, *paths.values(), out / f"{prefix}results.json", out / f"{prefix}results.csv"]


def draw_all(
    rows: Sequence[Row], settings: Sequence[Setting], verdicts: Verdicts | None
) -> dict[str, Figure | None]:
    """All pictures; None where there is nothing to show."""
    return {
        "front": figures.draw_front(settings),
        "lambda": figures.draw_lambda(settings),
        "policies": figures.draw_policies(verdicts),
        **gradients.draw_all(rows),
        "by_time": figures.draw_by_time(settings),
        "curves": figures.draw_curves(rows),
    }


def summary(rows: Sequence[Row], settings: Sequence[Setting], verdicts: Verdicts | None) -> dict[str, Any]:
    """All numbers as JSON: cells, settings with intervals, and the policies' verdicts."""

    def mean(found: Mean | None) -> dict[str, Any] | None:
        return found and {"mean": found.mean, "low": found.low, "high": found.high}

    found = {
        "cells": records(rows, columns_of(rows)),
        "pareto": [s.label for s in pareto_settings(settings)],
        "settings": [
            {
                "policy": s.policy,
                **_weights(s),
                "insulation": s.kappa,
                "label": s.label,
                "seeds": len(s.rows),
                **{name: mean(s.mean(name)) for name in columns_of(rows)},
            }
            for s in settings
        ],
        "above_the_smallest_loss": [
            {"label": a.setting.label, **{name: mean(m) for name, m in a.losses.items()}}
            for a in apart(settings)
        ],
        "versions": rows[0].result["versions"],
    }
    if verdicts:
        found["best_fixed"] = {"cost": verdicts.best.weight}
        if verdicts.most_successful:
            found["best_fixed"]["success"] = verdicts.most_successful.weight
        found["hypervolume_of_all_fixed"] = mean(verdicts.front)
        found["verdicts"] = [
            {
                "policy": v.setting.policy,
                **_weights(v.setting),
                "hypervolume": mean(v.hypervolume),
                "regret": mean(v.regret),
                "success_regret": mean(v.success_regret),
            }
            for v in [*verdicts.policies, *verdicts.fixed]
        ]
    return found


def _weights(setting: Setting) -> dict[str, float]:
    """λ of every term but the text's."""
    objective = setting.rows[0].config.objective
    others = {f"{name}_weight": weight for name, weight in objective.weights}
    return {"action_weight": objective.action_weight, **others}


def _heading(name: str) -> str:
    """Of a picture; one of other gradients than those of text and actions names them."""
    kind, *pair = name.split(":")
    return HEADINGS[kind] + (f" of {pair[0]} and {pair[1]}" if pair else "")


def _caption(name: str) -> str:
    return CAPTIONS[name.split(":")[0]]


def settings_table(settings: Sequence[Setting]) -> list[Mapping[str, str]]:
    """Settings with mean ± half width of the interval, for people."""
    names = [name for name in (*losses_of(settings), *SHOWN) if any(s.mean(name) for s in settings)]
    return [
        {"setting": s.label, "seeds": str(len(s.rows))} | {n: text(n, s.mean(n)) for n in names}
        for s in settings
    ]


def apart_table(found: Sequence[Apart]) -> list[Mapping[str, str]]:
    """By how much each loss lies above the smallest one, for people."""
    return [
        {"setting": a.setting.label} | {name: percent(mean) for name, mean in a.losses.items()} for a in found
    ]


def percent(mean: Mean | None) -> str:
    """``+12.3 % (8.1 to 16.7)``; a dash where it does not apply."""
    if mean is None:
        return "–"
    return f"{100 * mean.mean:+.1f} % ({100 * mean.low:.1f} to {100 * mean.high:.1f})"


def text(name: str, mean: Mean | None) -> str:
    """``12.3 ± 0.4``; a dash where it does not apply."""
    if mean is None:
        return "–"
    half = mean.high - mean.mean
    if name in PERCENT:
        return f"{100 * mean.mean:.1f} ± {100 * half:.1f} %"
    return f"{mean.mean:.4f} ± {half:.4f}"


def _page(
    folders: Sequence[Path],
    rows: Sequence[Row],
    settings: Sequence[Setting],
    verdicts: Verdicts | None,
    paths: Mapping[str, Path],
    missing: Sequence[str],
) -> str:
    asked = [entry for folder in folders for entry in Store(folder).asked()]
    diverged = [row.name for row in rows if row.result["diverged"]]
    versions = ", ".join(f"{k} {v}" for k, v in rows[0].result["versions"].items())
    facts = [
        f"{len(rows)} cells finished, {len(missing)} not yet; {len(diverged)} diverged"
        + (f" ({', '.join(diverged)})." if diverged else "."),
        f"Versions: {versions}.",
        "All cells saw the same data in the same order; losses are on held-out episodes, with the averaged parameters "
        "where the run keeps them. ± is half of Student's 95 % interval over seeds.",
    ]
    sections = [
        html.section(
            "What was run", html.code("\n".join(e["command"] for e in asked)), *map(html.paragraph, facts)
        )
    ]
    sections += [
        html.section(_heading(name), html.picture(path, _heading(name)), html.paragraph(_caption(name)))
        for name, path in paths.items()
    ]
    if verdicts:
        sections.append(html.section("Verdicts", html.table(verdict_table(verdicts))))
    sections.append(html.section("All settings", html.table(settings_table(settings))))
    if found := apart(settings):
        note = "Geometric means of ratios, paired by seed, with Student's 95 % intervals of their logarithms."
        table = html.table(apart_table(found))
        sections.append(html.section("Above the smallest loss of any fixed λ", table, html.paragraph(note)))
    hashes = "\n".join(f"{row.result['config_hash']}  {row.name}" for row in rows)
    config = json.dumps(json.loads((rows[0].folder / "config.json").read_text()), indent=1)
    sections.append(html.section("Configurations", html.code(hashes)))
    sections.append(html.section(f"The first one in full: {rows[0].name}", html.code(config)))
    return html.page("Weighing language against action", sections)


def verdict_table(verdicts: Verdicts) -> list[Mapping[str, str]]:
    """Hypervolume and regrets, for people."""
    lines = [*sorted(verdicts.policies, key=figures.by_regret), *verdicts.fixed]
    return [
        {
            "policy": f"{v.setting.policy}, {v.setting.symbol}={v.setting.weight:g}",
            "hypervolume": text("", v.hypervolume),
            f"regret against {verdicts.best.symbol}={verdicts.best.weight:g}": text("", v.regret),
            "success lost against the most successful λ": text("success", v.success_regret),
        }
        for v in lines
    ]
