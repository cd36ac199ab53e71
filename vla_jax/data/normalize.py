"""State and actions to the model's scale and back, by statistics of the data set or of each task."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float

from vla_jax.data.sample import Sample, check_dims
from vla_jax.data.statistics import FieldStatistics, Statistics


@dataclasses.dataclass(frozen=True)
class Normalize:
    """State and actions to the model's scale.

    zscore: (x - mean) / std. quantile: 1 % and 99 % quantiles to -1 and 1, no clipping; where these two
    coincide, minimum and maximum are used. A constant dimension becomes 0 and comes back as its value.
    """

    method: Literal["zscore", "quantile"]
    group: Literal["dataset", "task"]
    """One set of statistics under the key "", or one per task."""
    statistics: dict[str, Statistics]
    task_of: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instruction → task, for samples that do not name theirs."""
    _affine: dict = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.method not in ("zscore", "quantile") or self.group not in ("dataset", "task"):
            raise ValueError(f"Normalize(method={self.method!r}, group={self.group!r}): unknown")
        if not self.statistics or (self.group == "dataset") != (set(self.statistics) == {""}):
            raise ValueError(f"Normalize by {self.group} with statistics of {sorted(self.statistics)}")
        affine = {
            (key, field): _affine(getattr(statistics, field), self.method)
            for key, statistics in self.statistics.items()
            for field in ("state", "action")
        }
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
        check_dims("action", sample.actions, len(scale))
        return sample.replace(actions=(sample.actions * scale + offset).astype(np.float32))

    def affine(
        self, key: str, field: Literal["state", "action"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
                f"no task is known for the instruction {sample.instruction!r}, so its statistics cannot be chosen; "
                "use an instruction of the data set, or train with data.normalization_group=dataset"
            )
        if task not in self.statistics:
            raise ValueError(f"no statistics of task {task!r}; there are those of {sorted(self.statistics)}")
        return task


def _affine(statistics: FieldStatistics, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offset, scale, 1/scale in float64; scale and 1/scale are 0 for a constant dimension."""
    s = {
        field: np.asarray(getattr(statistics, field)) for field in ("mean", "std", "min", "max", "q01", "q99")
    }
    if method == "zscore":
        offset, scale = s["mean"], s["std"]
    else:
        degenerate = s["q01"] == s["q99"]
        low, high = np.where(degenerate, s["min"], s["q01"]), np.where(degenerate, s["max"], s["q99"])
        offset, scale = (low + high) / 2, (high - low) / 2
    scale = np.where(statistics.constant, 0.0, scale)
    offset = np.where(statistics.constant, s["min"], offset)
    return offset, scale, np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
