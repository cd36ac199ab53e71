"""Mean, deviation, range and quantiles of states and actions, in one pass that decodes no image.

Moments are merged chunk by chunk in float64 (Chan, Golub and LeVeque 1979, eq. 2.1). Quantiles are exact
(linear interpolation, as numpy's) up to `MAX_ROWS` rows; beyond, they are those of a uniform sample of that
many rows, always the same one.

A dimension that never changes (min == max) is *constant*: it normalises to 0. (Its deviation is exactly 0 too:
float64 sums of equal float32 values do not round.) What hardly changes is divided by `FieldStatistics.least_scale`
rather than by its own spread, which is rounding or noise of the sensor: any other value would become huge.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vla_jax.data.derived import cached
from vla_jax.data.index import check_finite
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.source import EpisodeSource

MAX_ROWS = 200_000
RESOLUTION = 2.0**-16
"""Least scale of a dimension over its largest magnitude: 128 steps of float32. A reading of 1 m that varies by 0.1 mm
lies well above it, one that varies in its last bits does not."""
REACH = 32.0
"""Most that a dimension's whole range may be in units of its scale. A normal distribution's is about 10."""
LEAST = float(np.finfo(np.float32).eps)
"""Least scale of what stays around 0: the rounding that sums of numbers around 1 leave there."""
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldStatistics:
    """Statistics per dimension; `std` is that of the population (divided by the count)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int

    def __post_init__(self):
        for field in ("mean", "std", "min", "max", "q01", "q99"):
            object.__setattr__(self, field, tuple(float(x) for x in getattr(self, field)))

    @property
    def dims(self) -> int:
        """Number of dimensions."""
        return len(self.mean)

    @property
    def constant(self) -> tuple[bool, ...]:
        """Which dimensions never change."""
        return tuple(low == high for low, high in zip(self.min, self.max))

    @property
    def least_scale(self) -> Float[np.ndarray, " dims"]:
        """What each dimension is divided by at least, in its own units; float64."""
        low, high = np.asarray(self.min), np.asarray(self.max)
        magnitude = np.maximum(np.abs(low), np.abs(high))
        return np.maximum(np.maximum(RESOLUTION * magnitude, (high - low) / REACH), LEAST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of state and action over the same steps."""

    state: FieldStatistics
    action: FieldStatistics

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Statistics":
        """The inverse of `dataclasses.asdict`. Raises ValueError where a statistic is missing."""
        try:
            return cls(**{field: FieldStatistics(**values[field]) for field in ("state", "action")})
        except (KeyError, TypeError) as error:
            raise ValueError(f"statistics are incomplete: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Statistics of all episodes, and of each task's."""

    dataset: Statistics
    per_task: dict[str, Statistics]


def constant_dims(statistics: Mapping[str, Statistics], schema: DatasetSchema) -> tuple[str, ...]:
    """A line for each constant dimension, to be shown to the user before training; "" is the whole data set."""
    names = {"state": schema.state_names, "action": schema.action_names}
    lines = []
    for group, found in statistics.items():
        for field, fields in names.items():
            values = getattr(found, field)
            lines += [
                f"{f'task {group}: ' if group else ''}{field} {name!r} is always {value:g}; it normalises to 0"
                for name, value, constant in zip(fields, values.min, values.constant)
                if constant
            ]
    return tuple(lines)


class Accumulator:
    """Running statistics of rows [n dims] that arrive in chunks."""

    def __init__(self, dims: int, max_rows: int = MAX_ROWS):
        self.count = 0
        self._mean = np.zeros(dims)
        self._squares = np.zeros(dims)  # sum of squared deviations from the mean
        self._min = np.full(dims, np.inf)
        self._max = np.full(dims, -np.inf)
        # The rows of lowest priority among all are a uniform sample without replacement.
        self._random = np.random.default_rng(0)
        self._max_rows = max_rows
        self._rows: list[np.ndarray] = []
        self._priorities: list[np.ndarray] = []
        self._kept = 0

    def add(self, rows: Float[np.ndarray, "n dims"]) -> None:
        """Take in a chunk of rows."""
        exact = rows.astype(np.float64)
        n = len(exact)
        mean = exact.mean(axis=0)
        delta, total = mean - self._mean, self.count + n
        self._squares += ((exact - mean) ** 2).sum(axis=0) + delta**2 * (self.count * n / total)
        self._mean += delta * (n / total)
        self.count = total
        self._min = np.minimum(self._min, exact.min(axis=0))
        self._max = np.maximum(self._max, exact.max(axis=0))
        self._rows.append(rows)
        self._priorities.append(self._random.random(n))
        self._kept += n
        if self._kept > 2 * self._max_rows:
            self._shrink()

    def result(self) -> FieldStatistics:
        """The statistics of all rows so far."""
        self._shrink()
        quantiles = np.quantile(self._rows[0].astype(np.float64), (0.01, 0.99), axis=0)
        return FieldStatistics(
            mean=tuple(self._mean),
            std=tuple(np.sqrt(self._squares / self.count)),
            min=tuple(self._min),
            max=tuple(self._max),
            q01=tuple(quantiles[0]),
            q99=tuple(quantiles[1]),
            count=self.count,
        )

    def _shrink(self) -> None:
        rows, priorities = np.concatenate(self._rows), np.concatenate(self._priorities)
        if len(rows) > self._max_rows:
            keep = np.argpartition(priorities, self._max_rows)[: self._max_rows]
            rows, priorities = rows[keep], priorities[keep]
        self._rows, self._priorities, self._kept = [rows], [priorities], len(rows)


Rows = Callable[[EncodedEpisode], Mapping[str, Float[np.ndarray, "n dims"]]]
"""The rows of "state" and "action" that an episode adds to the statistics, where they are not its steps as recorded."""


def compute_statistics(
    episodes: Iterable[EncodedEpisode],
    schema: DatasetSchema,
    max_rows: int = MAX_ROWS,
    rows_of: Rows | None = None,
) -> DatasetStatistics:
    """Statistics of the given episodes. Raises ValueError at missing dims and at NaN or infinite values."""
    sizes = {"state": len(schema.state_names), "action": len(schema.action_names)}
    groups: dict[str | None, dict[str, Accumulator]] = {}
    for episode in episodes:
        check_finite(episode, schema)
        found = {field: getattr(episode, field) for field in sizes}
        for field, dims in sizes.items():
            if found[field].shape[1] != dims:
                raise ValueError(
                    f"episode {episode.number}: {field} has {found[field].shape[1]} dims, the schema {schema.name} "
                    f"{dims}"
                )
        found = found if rows_of is None else rows_of(episode)
        for group in (None, episode.metadata["task"]):
            accumulators = groups.setdefault(group, {})
            for field, dims in sizes.items():
                accumulators.setdefault(field, Accumulator(dims, max_rows)).add(found[field])
    if not groups:
        raise ValueError(f"no episodes to compute the statistics of {schema.name} from")
    results = {
        group: Statistics(**{field: accumulator.result() for field, accumulator in fields.items()})
        for group, fields in groups.items()
    }
    tasks = sorted(group for group in results if group is not None)
    return DatasetStatistics(dataset=results[None], per_task={task: results[task] for task in tasks})


def dataset_statistics(
    source: EpisodeSource,
    episodes: Sequence[int] | Int[np.ndarray, " n"],
    fingerprint: str | None = None,
    *,
    rows_of: Rows | None = None,
    rows_key: Any = None,
) -> DatasetStatistics:
    """Statistics of some episodes of a data set, kept beside it under what they were computed from.

    `rows_key` (JSON values) says what `rows_of` does.
    """
    numbers = [int(number) for number in episodes]
    key = {
        "data": fingerprint or source.fingerprint(),
        "episodes": numbers,
        "max_rows": MAX_ROWS,
        "version": _VERSION,
        **({} if rows_of is None else {"rows": rows_key}),
    }
    value = cached(
        source.path,
        "statistics",
        key,
        lambda: dataclasses.asdict(
            compute_statistics(map(source.read, numbers), source.schema, rows_of=rows_of)
        ),
    )
    return DatasetStatistics(
        dataset=Statistics.from_json(value["dataset"]),
        per_task={task: Statistics.from_json(values) for task, values in value["per_task"].items()},
    )
