"""A sweep's results as a table: one row per cell, and per setting the mean over seeds with its interval."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vla_jax.checkpoint.manager import flatten
from vla_jax.config import TrainConfig, config_hash, from_json, to_json
from vla_jax.files import read_json
from vla_jax.lab.grid import parse_grid, value_of
from vla_jax.lab.store import Store

METRICS: dict[str, tuple[str, str]] = {
    "ce": ("val", "text_loss"),
    "text_accuracy": ("val", "text_accuracy"),
    "success": ("closed_loop", "success"),
    "swapped_success": ("closed_loop", "swapped_success"),
    "plan_accuracy": ("closed_loop", "plan_accuracy"),
    "forced_plan_followed": ("closed_loop", "forced_plan_followed"),
    "collision": ("closed_loop", "collision"),
    "diversity": ("closed_loop", "chunk_diversity"),
}
"""Column → where it stands in a cell's result; every other is of the validation, as ``action_loss``."""

MEND = "delete the cell's folder and give launch.sweep the same command again"

TOLD_APART = (
    "objective.action_weight", "objective.weights", "objective.insulation", "objective.weighting.",
    "objective.diagnostics.",
)  # fmt: skip
"""Fields (beginnings of them) in which the cells of one report may differ, besides the seed."""


class Mean(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t; equal to the mean where there is one seed)."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One finished cell."""

    name: str
    config: TrainConfig
    result: dict[str, Any]
    folder: Path
    axis: str = "action"
    """The term whose λ the report is about: the one that the cells differ in."""

    @property
    def policy(self) -> str:
        """The λ policy's name."""
        return self.config.objective.weighting.policy

    @property
    def weight(self) -> float:
        """λ of `axis`, or the policy's scale of it."""
        return self.config.objective.weight(self.axis)

    @property
    def symbol(self) -> str:
        """How λ of `axis` is written."""
        return "λ" if self.axis == "action" else f"λ_{self.axis}"

    @property
    def kappa(self) -> float:
        """κ, which scales the gradient from the expert to the backbone (`objective.insulation`)."""
        return self.config.objective.insulation

    def metric(self, name: str) -> float | None:
        """A column; None where it does not apply."""
        where, key = METRICS.get(name, ("val", name))
        return (self.result[where] or {}).get(key)

    def by_time(self) -> list[float] | None:
        """The validation action loss by bin of t."""
        return self.result["val"].get("action_loss_by_time")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Cells that differ in nothing but the seed."""

    label: str
    rows: tuple[Row, ...]
    """In the order of their seeds."""

    @property
    def policy(self) -> str:
        """The λ policy's name."""
        return self.rows[0].policy

    @property
    def weight(self) -> float:
        """λ, or the policy's scale of it; see `Row`."""
        return self.rows[0].weight

    @property
    def symbol(self) -> str:
        """How λ is written."""
        return self.rows[0].symbol

    @property
    def kappa(self) -> float:
        """κ, which scales the gradient from the expert to the backbone (`objective.insulation`)."""
        return self.rows[0].kappa

    @property
    def seeds(self) -> list[int]:
        """In the order of the rows."""
        return [row.config.seed for row in self.rows]

    def mean(self, name: str) -> Mean | None:
        """A column's mean over seeds; None where some cell lacks it."""
        values = [row.metric(name) for row in self.rows]
        known = [value for value in values if value is not None]
        return mean_of(known) if len(known) == len(values) else None

    def known(self, name: str) -> Mean:
        """The same of a column that every cell has. Raises ValueError where one lacks it."""
        mean = self.mean(name)
        if mean is None:
            raise ValueError(f"some cell of {self.label} has no {name}")
        return mean


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and 95 % interval of independent values."""
    values = tuple(float(v) for v in values)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Mean(mean, mean, mean, values)
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Mean(mean, mean - half, mean + half, values)


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """All finished cells of some sweeps' directories, in the order in which they were asked for.

    Raises ValueError where there is none, or where a cell is in two of them with different configurations.
    """
    rows: dict[str, Row] = {}
    for folder in folders:
        store = Store(folder)
        names = [name for asked in store.asked() for name in asked["cells"]]
        for name in dict.fromkeys(names):
            result = store.result(name)
            if result is None:
                continue
            config = from_json(json.dumps(read_json(store.cell(name) / "config.json", mend=MEND)))
            row = Row(name=name, config=config, result=result, folder=store.cell(name))
            if name in rows and config_hash(rows[name].config) != config_hash(config):
                raise ValueError(f"{folder} and {rows[name].folder.parents[1]} have different cells {name}")
            rows.setdefault(name, row)
    if not rows:
        places = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"{places}: no finished cell of a sweep; run launch.sweep --out there first")
    return list(rows.values())


def where(rows: Sequence[Row], conditions: Sequence[str]) -> list[Row]:
    """The rows of which all ``FIELD=VALUE`` hold. Raises ValueError where a field is unknown or no row is left."""
    for condition in conditions:
        for field, (value,) in _single(parse_grid([condition])):
            found = sorted({str(value_of(row.config, field)) for row in rows})
            rows = [row for row in rows if value_of(row.config, field) == value]
            if not rows:
                raise ValueError(f"--where {condition}: no cell; {field} is {', '.join(found)}")
    return list(rows)


def _single(axes: dict[str, list[Any]]) -> Iterable[tuple[str, list[Any]]]:
    for field, values in axes.items():
        if len(values) != 1:
            raise ValueError(f"--where {field}: one value, not {len(values)}")
        yield field, values


def check_comparable(rows: Sequence[Row]) -> None:
    """Raises ValueError where the cells differ in more than what the figures tell apart.

    A line through the fixed λ, and a best one among them, mean nothing across learning rates or data sets.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for field, value in flatten(json.loads(to_json(row.config))).items():
            if field != "seed" and not field.startswith(TOLD_APART):
                values.setdefault(field, set()).add(json.dumps(value))
    for field, found in values.items():
        if len(found) > 1:
            some = ", ".join(sorted(found)[:4])
            raise ValueError(
                f"the cells differ in {field} ({some}), which no figure shows: report one value at a time with "
                f"--where {field}=VALUE"
            )


def unfinished(folders: Sequence[Path]) -> list[str]:
    """Cells that were asked for and have no result."""
    return [
        name
        for folder in folders
        for asked in Store(folder).asked()
        for name in asked["cells"]
        if Store(folder).result(name) is None
    ]


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """The rows by everything but the seed, in order of first appearance."""
    groups: dict[TrainConfig, list[Row]] = {}
    for row in rows:
        groups.setdefault(dataclasses.replace(row.config, seed=0), []).append(row)
    return [
        Setting(
            label=", ".join(row_label(group[0])),
            rows=tuple(sorted(group, key=lambda r: r.config.seed)),
        )
        for group in groups.values()
    ]


def row_label(row: Row) -> list[str]:
    """What distinguishes a setting, for people: policy, λ, κ, and whatever else was varied."""
    return [row.policy, f"{row.symbol}={row.weight:g}", f"κ={row.kappa:g}", *others_varied(row)]


def others_varied(row: Row) -> list[str]:
    """What the sweep varied besides policy, λ, κ and seed: ``name=value``."""
    short = {"objective.weighting.policy", "objective.action_weight", "objective.insulation", "seed"}
    short.add(f"objective.weights.{row.axis}")
    rest = {k: v for k, v in row.result["values"].items() if k not in short}
    return [f"{k.split('.')[-1]}={v}" for k, v in rest.items()]


def records(rows: Sequence[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    """One flat record per cell, of the given columns."""
    return [
        {
            "cell": row.name,
            "policy": row.policy,
            "action_weight": row.config.objective.action_weight,
            **{f"{name}_weight": weight for name, weight in row.config.objective.weights},
            "insulation": row.kappa,
            "seed": row.config.seed,
            **{k: v for k, v in row.result["values"].items() if value_of(row.config, k) == v},
            **{name: row.metric(name) for name in columns},
            **{f"action_loss_t{i}": v for i, v in enumerate(row.by_time() or [])},
            "skipped": row.result["skipped"],
            "diverged": row.result["diverged"],
            "config_hash": row.result["config_hash"],
        }
        for row in rows
    ]


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """Records as CSV; what a record lacks stays empty."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()
