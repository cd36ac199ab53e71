"""Configurations of several kinds in one field: `kind` names the dataclass, in a file, on the command line, in code."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.experts import EXPERTS
from vla_jax.models.experts.base import ExpertConfig

TABLES: dict[type, Mapping[str, type]] = {BackboneConfig: BACKBONES, ExpertConfig: EXPERTS}
"""What a field of a base class may hold, by kind."""
FIELDS = {"model.backbone": BackboneConfig, "model.expert": ExpertConfig}
"""Where such fields are in a run's configuration."""


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
