"""Accounting: every array of a file is named by the table, and every one of the table is in the file."""

from collections.abc import Collection, Mapping
from pathlib import Path

from vla_jax.convert.entry import ArraySpec, Shape

#: Names that an error lists of each kind.
LISTED = 5


def account(
    where: str | Path,
    found: Mapping[str, ArraySpec],
    expected: Mapping[str, Shape],
    *,
    unused: Collection[str] = (),
) -> None:
    """Raises ValueError unless `found` has exactly the `expected` arrays, of those shapes.

    `unused` may be there besides (copies of tied weights, outputs that nothing reads).
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "not known": [name for name in found if name not in expected and name not in unused],
        "of another shape": [
            f"{name} {found[name].shape} (wanted {shape})"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "not of floats": [
            f"{name} {found[name].dtype}"
            for name in expected
            if name in found and found[name].dtype.name not in ("float32", "bfloat16", "float16", "float64")
        ],
    }
    said = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if said:
        raise ValueError(f"{where} does not fit: {'; '.join(said)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(sorted(names)[:LISTED]) + more
