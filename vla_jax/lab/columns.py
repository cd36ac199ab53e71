"""What a report is about: the terms of the objective, their columns, and the λ along which its figures are drawn."""

import dataclasses
from collections.abc import Iterable, Sequence

from vla_jax.lab.table import METRICS, Row, Setting
from vla_jax.objectives.terms import TERMS


def terms_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """The terms of the objective that any of the rows computes."""
    asked = {name for row in rows for name in row.config.objective.asked}
    return tuple(name for name in TERMS if name in asked)


def losses_of(settings: Iterable[Setting]) -> tuple[str, ...]:
    """The columns of the terms' losses."""
    return tuple(loss_column(name) for name in terms_of(row for s in settings for row in s.rows))


def loss_column(term: str) -> str:
    """The column of a term's loss on held-out episodes."""
    return "ce" if term == "text" else f"{term}_loss"


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """All columns that a report has: the losses first."""
    losses = [loss_column(name) for name in terms_of(rows)]
    return tuple(dict.fromkeys(["ce", "action_loss", *losses, *METRICS]))


def along_one_axis(rows: Sequence[Row]) -> list[Row]:
    """The rows with the term whose λ they differ in as their `axis`; actions where there is none.

    Raises ValueError where they differ in more than one λ, of which the figures have no picture.
    """
    varied = {
        name: sorted({row.config.objective.weight(name) for row in rows})
        for name in terms_of(rows)
        if name != "text"
    }
    varied = {name: values for name, values in varied.items() if len(values) > 1}
    if len(varied) > 1:
        *_, (name, (*_, value)) = varied.items()
        raise ValueError(
            f"the cells differ in the weights of {' and of '.join(varied)}, and figures have one λ: report one value "
            f"of all but one at a time, as with --where objective.weights.{name}={value:g}"
        )
    axis = next(iter(varied), "action")
    return [dataclasses.replace(row, axis=axis) for row in rows]
