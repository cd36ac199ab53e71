"""State and actions to the model's scale and back, by statistics of the data set or of each task."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float

from vla_jax.data.quote import quoted
from vla_jax.data.sample import Sample, check_dims
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.statistics import REACH, FieldStatistics, Statistics

Method = Literal["zscore", "quantile"]
Field = Literal["state", "action"]


@dataclasses.dataclass(frozen=True)
class Normalize:
    """State and actions to the model's scale.

    zscore: (x - mean) / std. quantile: 1 % and 99 % quantiles to -1 and 1, no clipping; where these two
    coincide, minimum and maximum are used. A constant dimension becomes 0 and comes back as its value. A scale is
    at least `FieldStatistics.least_scale`, towards the model and back alike.
    """

    method: Method
    group: Literal["dataset", "task"]
    """One set of statistics under the key "", or one per task."""
    statistics: dict[str, Statistics]
    task_of: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instruction → task, for samples that do not name theirs."""
    floor: bool = True
    """Whether scales have that least value. Not so for statistics that were imported, whose formula is another
    library's, and for policies that were trained before there was one: both act as they were trained."""
    unscaled: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """"state" or "action" → dimensions that stay as they are, whatever their statistics."""
    _affine: dict = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.method not in ("zscore", "quantile") or self.group not in ("dataset", "task"):
            raise ValueError(f"Normalize(method={self.method!r}, group={self.group!r}): unknown")
        if not self.statistics or (self.group == "dataset") != (set(self.statistics) == {""}):
            raise ValueError(f"Normalize by {self.group} with statistics of {sorted(self.statistics)}")
        affine = {
            (key, field): _affine(getattr(statistics, field), self.method, self.floor)
            for key, statistics in self.statistics.items()
            for field in ("state", "action")
        }
        for field, dims in self.unscaled.items():
            for key in self.statistics:
                for values, same in zip(affine[key, field], (0.0, 1.0, 1.0)):
                    values[list(dims)] = same
        object.__setattr__(self, "_affine", affine)

    def inputs(self, sample: Sample) -> Sample:
        """State, and actions where there are any, in units of the statistics."""
        key = self.key(sample)
        changes = {"state": self._forward(key, "state", sample.state)}
        if sample.actions is not None:
            changes["actions"] = self._forward(key, "action", sample.actions)
        return sample.replace(**changes)

    def outputs(self, sample: Sample) -> Sample:
        """Actions in the robot's units."""
        offset, scale, _ = self._affine[self.key(sample), "action"]
        check_dims("action", sample.chunk, len(scale))
        return sample.replace(actions=(sample.chunk * scale + offset).astype(np.float32))

    def affine(self, key: str, field: Field) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """offset, scale and 1/scale of a group of statistics, float64; both scales are 0 for a constant dimension."""
        return self._affine[key, field]

    def _forward(self, key: str, field: str, x: Float[np.ndarray, "... dims"]) -> np.ndarray:
        offset, _, inverse = self._affine[key, field]
        check_dims(field, x, len(offset))
        return ((x - offset) * inverse).astype(np.float32)

    def key(self, sample: Sample) -> str:
        """Which statistics a sample is measured by. Raises ValueError where that is not known."""
        if self.group == "dataset":
            return ""
        task = sample.task if sample.task is not None else self.task_of.get(sample.instruction)
        if task is None:
            raise ValueError(
                f"no task is known for the instruction {quoted(sample.instruction)}, so its statistics cannot be "
                "chosen; use an instruction of the data set, or train with data.normalization_group=dataset"
            )
        if task not in self.statistics:
            raise ValueError(f"no statistics of task {task!r}; there are those of {sorted(self.statistics)}")
        return task


def narrow_dims(normalize: Normalize, schema: DatasetSchema) -> tuple[str, ...]:
    """A line for each dimension that is not divided by its own spread, to be shown to the user before training."""
    lines = []
    for group, found in normalize.statistics.items() if normalize.floor else ():
        for field, names in (("state", schema.state_names), ("action", schema.action_names)):
            statistics = getattr(found, field)
            spreads = _spread(statistics, normalize.method)[1]
            for dim in np.flatnonzero((spreads < statistics.least_scale) & ~np.asarray(statistics.constant)):
                low, high, scale = statistics.min[dim], statistics.max[dim], statistics.least_scale[dim]
                lines.append(
                    f"{f'task {group}: ' if group else ''}{field} {names[dim]!r} hardly changes: it spreads by "
                    f"{spreads[dim]:.2g} between {low:g} and {high:g}; it is divided by {scale:.2g} instead"
                    + (
                        ", and if its extremes are faulty readings, leave these episodes out"
                        if (high - low) / REACH == scale
                        else ""
                    )
                )
    return tuple(lines)


def _affine(
    statistics: FieldStatistics, method: str, floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offset, scale, 1/scale in float64; scale and 1/scale are 0 for a constant dimension."""
    offset, scale = _spread(statistics, method)
    if floor:
        scale = np.maximum(scale, statistics.least_scale)
    scale = np.where(statistics.constant, 0.0, scale)
    offset = np.where(statistics.constant, statistics.min, offset)
    return offset, scale, np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)


def _spread(statistics: FieldStatistics, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a dimension lies and how far it spreads, by the method's formula."""
    s = {
        field: np.asarray(getattr(statistics, field)) for field in ("mean", "std", "min", "max", "q01", "q99")
    }
    if method == "zscore":
        return s["mean"], s["std"]
    degenerate = s["q01"] == s["q99"]
    low, high = np.where(degenerate, s["min"], s["q01"]), np.where(degenerate, s["max"], s["q99"])
    return (low + high) / 2, (high - low) / 2
