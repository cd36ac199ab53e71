"""A sweep's cells: every combination of some fields' values, for every seed."""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from vla_jax.config import TrainConfig
from vla_jax.models.kinds import TABLES, of_kind
from vla_jax.objectives.terms import TERMS

KAPPA = "objective.insulation"
WEIGHTS = "objective.weights"
"""Its entries are fields too: ``objective.weights.NAME``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a sweep."""

    name: str
    """Its values in short, ``action_weight=0.1,seed=2``; also the name of its directory."""
    values: dict[str, Any]
    """Field → value, of the fields that the sweep varies and of the seed."""
    config: TrainConfig
    """The whole configuration: launch.train with it trains the same model alone."""


def make_cells(base: TrainConfig, grid: Sequence[str], seeds: int) -> list[Cell]:
    """The cells of ``field=value,value,…`` entries and of the seeds from the configuration's own on.

    All see the data in the order that the base configuration's seed gives them. Raises ValueError in one line, also
    for combinations that the configuration refuses.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least 1")
    axes = parse_grid(grid)
    names = short_names(list(axes))
    order = base.seed if base.data.seed is None else base.data.seed
    cells = []
    for values in itertools.product(*axes.values(), range(base.seed, base.seed + seeds)):
        chosen = dict(zip([*axes, "seed"], values))
        weight = chosen.get("objective.action_weight", base.objective.action_weight)
        if weight == 0 and chosen.get(KAPPA) != axes.get(KAPPA, [None])[0]:
            continue  # without an action loss κ scales nothing: one cell stands for all its values
        label = ",".join(f"{names.get(field, field)}={_text(value)}" for field, value in chosen.items())
        changes = {"data.seed": order} | chosen
        quiet = {"objective.diagnostics.every": 0} | changes
        zero = weight == 0 or any(v == 0 for f, v in chosen.items() if f.startswith(f"{WEIGHTS}."))
        if zero and len(replaced(base, quiet).objective.asked) < 2:
            changes = quiet  # there is one gradient only
        cells.append(Cell(name=label, values=chosen, config=replaced(base, changes)))
    return cells


def parse_grid(entries: Sequence[str]) -> dict[str, list[Any]]:
    """Field → values. Raises ValueError for unknown fields, wrong values and repetitions."""
    others = [name for name in TERMS if name not in ("text", "action")]
    hints = dict(fields_of(TrainConfig)) | {f"{WEIGHTS}.{name}": float for name in others}
    axes: dict[str, list[Any]] = {}
    for entry in entries:
        field, equals, texts = entry.partition("=")
        field = field.strip().lstrip("-").replace("-", "_")
        if not equals or not texts.strip():
            raise ValueError(
                f"--grid {entry!r}: write FIELD=VALUE,VALUE,… as objective.action_weight=0.1,1,10"
            )
        if field not in hints:
            raise ValueError(f"--grid {entry!r}: there is no field {field}{_nearest(field, list(hints))}")
        if field in ("seed", "data.seed"):
            raise ValueError(f"--grid {entry!r}: use --seeds N for seeds")
        if field in axes:
            raise ValueError(f"--grid names {field} twice; give all its values at once")
        axes[field] = [parse_value(field, hints[field], text.strip()) for text in texts.split(",")]
        repeated = [v for i, v in enumerate(axes[field]) if v in axes[field][:i]]
        if repeated:
            raise ValueError(f"--grid {entry!r}: {_text(repeated[0])} is there twice")
    return axes


def parse_value(field: str, hint: Any, text: str) -> Any:
    """A value of the type `hint` from its text; raises ValueError."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text == "None" and types.NoneType in typing.get_args(hint):
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if text not in allowed:
            raise ValueError(f"--grid {field}: {text!r} is not one of {', '.join(map(str, allowed))}")
        return text
    if hint is bool:
        if text not in ("True", "False"):
            raise ValueError(f"--grid {field}: {text!r} is neither True nor False")
        return text == "True"
    if hint not in (int, float, str):
        raise ValueError(f"--grid {field}: fields that hold several values cannot be varied")
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"--grid {field}: {text!r} is not of type {hint.__name__}") from None


def fields_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all fields of a dataclass of dataclasses, with their types; of a backbone or an expert those of
    every kind, some names more than once."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        for one in TABLES.get(hint, {"": hint}).values():
            if dataclasses.is_dataclass(one):
                yield from fields_of(one, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}", one


def replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with dotted fields changed, all at once: each dataclass is checked in its new state only.

    Of named values, as `objective.weights` are, each is a field.
    """
    if isinstance(config, tuple):
        return tuple({**dict(config), **values}.items())
    own = {field: value for field, value in values.items() if "." not in field}
    if isinstance(config, tuple(TABLES)) and "kind" in own:
        config = of_kind(config, own.pop("kind"), "model")
    parts: dict[str, dict[str, Any]] = {}
    for field, value in values.items():
        part, dot, rest = field.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
    lacks = sorted({*own, *parts} - {field.name for field in dataclasses.fields(config)})
    if lacks:
        raise ValueError(f"{type(config).__name__} has no field {lacks[0]}, which the grid wants to vary")
    own |= {part: replaced(getattr(config, part), inner) for part, inner in parts.items()}
    return dataclasses.replace(config, **own)


def value_of(config: Any, field: str) -> Any:
    """The value of a dotted field; 0 of a weight that is not named."""
    for part in field.split("."):
        config = dict(config).get(part, 0.0) if isinstance(config, tuple) else getattr(config, part)
    return config


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Field → the shortest end of its dotted name that no other of them has."""
    names = {}
    for field in fields:
        parts = field.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [f".{other}" for other in fields if other != field]
        names[field] = next(end for end in ends if not any(o.endswith(f".{end}") for o in others))
    return names


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _nearest(field: str, known: list[str]) -> str:
    # Compare the last part first: people remember action_weight, not where it is.
    ends = {name.split(".")[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.7)
    end = difflib.get_close_matches(field.split(".")[-1], list(ends), n=1, cutoff=0)
    return f"; did you mean {near[0] if near else ends[end[0]]}?"
