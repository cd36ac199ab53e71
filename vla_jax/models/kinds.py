"""Configurations of several kinds in one field: `kind` names the dataclass, in a file, on the command line, in code."""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.encoders import ENCODERS
from vla_jax.models.encoders.base import ImageEncoderConfig
from vla_jax.models.experts import EXPERTS
from vla_jax.models.experts.base import ExpertConfig

TABLES: dict[type, Mapping[str, type]] = {
    BackboneConfig: BACKBONES,
    ExpertConfig: EXPERTS,
    ImageEncoderConfig: ENCODERS,
}
"""What a field of a base class may hold, by kind."""


Kind = TypeVar("Kind")


def required(part: BackboneConfig | ExpertConfig, kind: type[Kind], what: str) -> Kind:
    """The backbone's or expert's configuration, of the one kind that `what` knows. Raises ValueError elsewhere."""
    if not isinstance(part, kind):
        raise ValueError(f"{what} knows only a {kind.__name__}; this model has a {type(part).__name__}")
    return part


def class_of(base: type, kind: str, where: str) -> type:
    """The dataclass of a kind. Raises ValueError, which names the option `where`."""
    table = TABLES[base]
    if kind not in table:
        near = difflib.get_close_matches(kind, table, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table)}"
        raise ValueError(f"{where}.kind={kind} is not known; {hint}")
    return table[kind]


def of_kind(config: Any, kind: str, where: str) -> Any:
    """The default of another kind, with the fields that both have (horizon, dimensions, …) as in `config`."""
    if config.kind == kind:
        return config
    base = next(base for base in TABLES if isinstance(config, base))
    chosen = class_of(base, kind, where)
    shared = {field.name for field in dataclasses.fields(chosen)} & {
        field.name for field in dataclasses.fields(config)
    }
    return chosen(**{name: getattr(config, name) for name in shared - {"kind"}})


def choices(config: Any, where: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every option of a configuration that chooses a kind, ``model.expert.kind``, and what there is to choose."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint in TABLES:
            yield f"{where}{name}.kind", tuple(TABLES[hint])
        if dataclasses.is_dataclass(value):
            yield from choices(value, f"{where}{name}.")


def with_kinds(config: Any, chosen: Mapping[str, str], where: str = "") -> Any:
    """A configuration whose fields have other kinds: ``{"model.expert.kind": "dit"}``.

    The result is a set of defaults and no configuration yet: whether its parts fit one another is not checked, because
    the options that are to make them fit come after it.
    """
    changes = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value, path = getattr(config, name), f"{where}{name}"
        if hint in TABLES and f"{path}.kind" in chosen:
            value = of_kind(value, chosen[f"{path}.kind"], path)
        if dataclasses.is_dataclass(value) and any(option.startswith(f"{path}.") for option in chosen):
            value = with_kinds(value, chosen, f"{path}.")
        if value is not getattr(config, name):
            changes[name] = value
    if not changes:
        return config
    unchecked = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(unchecked, name, value)
    return unchecked
