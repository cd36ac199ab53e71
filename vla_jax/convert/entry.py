"""Two vocabularies of one model: a table of entries says which array of theirs is which part of which of ours.

One table serves both directions. Nothing here touches a file; see `sources` and `stream`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

#: Bytes that are read at once where an array need not be whole.
PIECE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and type of an array that has not been read."""

    shape: Shape
    dtype: np.dtype


@runtime_checkable
class ArraySource(Protocol):
    """Arrays by name, of which parts can be read."""

    @property
    def specs(self) -> Mapping[str, ArraySpec]:
        """Shapes and types by name."""
        ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The part `index` of an array: integers, then at most one slice."""
        ...


def rows_of(index: Index) -> slice:
    """The rows that `index` names, for a file of which only rows can be read; all of them where it is empty."""
    if not index:
        return slice(0, None)
    (rows,) = index
    if not isinstance(rows, slice):
        raise TypeError(f"{index} does not name rows")
    return rows


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is made piece by piece while it is written; pieces come in the order of memory."""

    shape: Shape
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[Index, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as an array of its `dtype`."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """`theirs` = regrouped(flip(`ours`[index])).

    The axes of our part are put in the order `order`, then each of their axes merges `groups` of them: a query
    projection [n d e] with order (0, 2, 1) and groups (2, 1) is [(n e) d].
    """

    theirs: str
    ours: str
    index: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    flip: Callable[[np.ndarray], np.ndarray] | None = None
    """Its own inverse, applied to our part (`time_flip`)."""
    rows: int | None = None
    """Rows of theirs, where it has more than ours: cut off on the way in, zeros on the way out."""

    @property
    def plain(self) -> bool:
        """Whether rows of theirs are rows of ours."""
        return self.order is None and self.groups is None and self.flip is None

    def part_shape(self, ours: Shape) -> Shape:
        """The shape of our part."""
        return ours[len(self.index) :]

    def theirs_shape(self, ours: Shape) -> Shape:
        """The shape of theirs, from the shape of our whole array."""
        shape = self._permuted(self.part_shape(ours))
        if self.groups is not None:
            sizes = iter(shape)
            shape = tuple(math.prod(next(sizes) for _ in range(group)) for group in self.groups)
        return shape if self.rows is None else (self.rows, *shape[1:])

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """From our part to their array (without the rows that only they have)."""
        if self.flip is not None:
            part = self.flip(part)
        if self.order is not None:
            part = part.transpose(self.order)
        return part if self.groups is None else self._merge(part)

    def to_ours(self, array: np.ndarray, ours: Shape) -> np.ndarray:
        """From their array to our part."""
        part = array.reshape(self._permuted(self.part_shape(ours)))
        if self.order is not None:
            part = part.transpose(np.argsort(self.order))
        return part if self.flip is None else self.flip(part)

    def _merge(self, part: np.ndarray) -> np.ndarray:
        if self.groups is None:
            return part
        sizes = iter(part.shape)
        return part.reshape([math.prod(next(sizes) for _ in range(group)) for group in self.groups])

    def _permuted(self, shape: Shape) -> Shape:
        return shape if self.order is None else tuple(shape[axis] for axis in self.order)


def imported(
    entries: list[Entry], source: ArraySource, shapes: Mapping[str, Shape], dtype: np.dtype | None
) -> dict[str, Lazy]:
    """Our arrays, made of theirs; `dtype` None keeps the type that each has."""
    by_ours: dict[str, list[Entry]] = {}
    for entry in entries:
        by_ours.setdefault(entry.ours, []).append(entry)

    def lazy(name: str, parts: list[Entry]) -> Lazy:
        shape = shapes[name]
        target = _target(parts[0].theirs, source.specs[parts[0].theirs], dtype)

        def pieces() -> Iterator[tuple[Index, np.ndarray]]:
            for entry in parts:
                spec = source.specs[entry.theirs]
                if not entry.plain:
                    array = checked(entry.theirs, source.read(entry.theirs))
                    yield entry.index, entry.to_ours(array, shape).astype(target)
                    continue
                for rows in row_slices(entry.part_shape(shape), spec.dtype.itemsize):
                    array = checked(entry.theirs, source.read(entry.theirs, rows))
                    yield (*entry.index, *rows), array.astype(target)

        return Lazy(shape, target, pieces)

    return {name: lazy(name, sorted(by_ours[name], key=lambda e: e.index)) for name in sorted(by_ours)}


def exported(entries: list[Entry], source: ArraySource, dtype: np.dtype | None) -> dict[str, Lazy]:
    """Their arrays, made of ours, in the order of the table."""

    def lazy(entry: Entry) -> Lazy:
        spec = source.specs[entry.ours]
        shape, target = entry.theirs_shape(spec.shape), _target(entry.ours, spec, dtype)
        part = entry.part_shape(spec.shape)

        def pieces() -> Iterator[tuple[Index, np.ndarray]]:
            if not entry.plain:
                array = entry.to_theirs(checked(entry.ours, source.read(entry.ours, entry.index)))
                yield (), array.astype(target)
                return
            for rows in row_slices(part, spec.dtype.itemsize):
                yield rows, checked(entry.ours, source.read(entry.ours, (*entry.index, *rows))).astype(target)
            if entry.rows is not None and entry.rows > part[0]:
                yield (slice(part[0], entry.rows),), np.zeros((entry.rows - part[0], *part[1:]), target)

        return Lazy(shape, target, pieces)

    return {entry.theirs: lazy(entry) for entry in entries}


def _target(name: str, spec: ArraySpec, dtype: np.dtype | None) -> np.dtype:
    if dtype is not None:
        return dtype
    if spec.dtype.itemsize > 4:
        raise ValueError(
            f"{name} is {spec.dtype.name}, which no network here computes in; convert with --dtype float32 or bfloat16"
        )
    return spec.dtype


def row_slices(shape: Shape, itemsize: int) -> Iterator[Index]:
    """Slices of the first axis of about `PIECE_BYTES`, in order; one empty index for a scalar."""
    if not shape:
        yield ()
        return
    step = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


def checked(name: str, array: np.ndarray) -> np.ndarray:
    """The array, unless it holds what no weight is."""
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} holds values that are not finite: the file is damaged, or was never trained"
        )
    return array
