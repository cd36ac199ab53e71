"""Episodes on the disk. A kind of data set is a `Reader` in a file of its own, and a line in `SOURCES`.

`source.EpisodeSource` is what the rest of the library reads through: any of them, with a cache.
"""

from pathlib import Path
from typing import ClassVar, Protocol

from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.rlds_reader import RldsReader


class Reader(Protocol):
    """One data set, opened. `Reader(path)` raises ValueError where it is damaged or half-written."""

    sign: ClassVar[str]
    """The file below a directory that says that a data set of this kind is there, whole or not."""

    def __init__(self, path: Path): ...

    @property
    def schema(self) -> DatasetSchema:
        """What its episodes hold."""
        ...

    def __len__(self) -> int:
        """How many episodes it has."""
        ...

    def read(self, number: int) -> EncodedEpisode:
        """Episode `number` from the disk; many threads may ask at once. Raises ValueError where it is damaged."""
        ...

    def fingerprint(self) -> str:
        """Another one where other data were written, at the cost of reading small files only."""
        ...


SOURCES: dict[str, type[Reader]] = {"rlds": RldsReader}
"""What data sets there are. A directory is read by the first one whose sign is there."""


def open_reader(path: Path) -> Reader:
    """The data set in a directory. Raises FileNotFoundError where there is none, and what its reader raises."""
    for kind in SOURCES.values():
        if (path / kind.sign).exists():
            return kind(path)
    signs = " or ".join(kind.sign for kind in SOURCES.values())
    raise FileNotFoundError(
        f"no data set in {path} ({signs} is missing); make one with python -m launch.collect --out {path}"
    )
