"""A run's own statistics of state and actions, as openpi keeps them beside weights.

openpi's formula is fixed by the model, (x - mean) / (std + 1e-6) for π0, the 1 % and 99 % quantiles to -1 and 1 for the
others; ours is the configuration's. So the two numbers that openpi reads are the data set's where it then computes what
the run did, and else such that it does:

- the run normalised by the other method;
- a dimension never changed: here the state becomes 0 and the action the constant, whatever the model says;
- its quantiles coincide: here minimum and maximum are used;
- it hardly changes: here it is divided by a least scale, not by its own spread.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_jax.config import prompt_form
from vla_jax.data.bundle import DataBundle
from vla_jax.data.normalize import Field, Method, Normalize
from vla_jax.models.config import VLAConfig

FIELDS: dict[str, Field] = {"state": "state", "actions": "action"}
"""openpi's names, and ours."""


def openpi_method(model: VLAConfig) -> Method:
    """How openpi normalises for the model that is built like this one."""
    return "zscore" if prompt_form(model) == "pi0" else "quantile"


def run_statistics(data: Mapping[str, Any], model: VLAConfig) -> dict[str, Any]:
    """``{name: {"state"|"actions": {mean, std, q01, q99}}}`` of a run's transforms (`data` in its metadata).

    The name is the data set's, or with statistics per task one for each task. As in openpi, the dimensions are the
    robot's own, not padded.
    """
    bundle = DataBundle.from_json(data)
    found = {}
    for group in bundle.normalize.statistics:
        found[group or bundle.schema.name] = {
            theirs: _field(bundle.normalize, group, ours, openpi_method(model))
            for theirs, ours in FIELDS.items()
        }
    return found


def _field(normalize: Normalize, group: str, field: Field, method: Method) -> dict[str, list[float]]:
    statistics = getattr(normalize.statistics[group], field)
    values = {kind: np.asarray(getattr(statistics, kind)) for kind in ("mean", "std", "q01", "q99")}
    offset, scale, _ = normalize.affine(group, field)
    if field == "state":
        # By a deviation of 0 and openpi's 1e-6, a motion of 1 after all would become a million.
        scale = np.where(scale > 0, scale, 1.0)
    read = (
        {"mean": offset, "std": scale}
        if method == "zscore"
        else {"q01": offset - scale, "q99": offset + scale}
    )
    own = values["std"] if method == "zscore" else (values["q99"] - values["q01"]) / 2
    same = (normalize.method == method) & (values["q01"] < values["q99"]) & (scale == own)
    values |= {kind: np.where(same, values[kind], wanted) for kind, wanted in read.items()}
    return {kind: value.tolist() for kind, value in values.items()}
