"""A data set of any kind, as all of the library reads it: episodes by number, kept in memory for a while."""

import collections
import os
import threading
from pathlib import Path
from typing import Any

from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources import open_reader
from vla_jax.data.sources.episode import EncodedEpisode


class EpisodeSource:
    """Random access to episodes, for many threads; pickled without its cache, reopened where it arrives.

    Parsing a record costs more than a sample, so parsed episodes are kept up to `cache_mb` megabytes, the
    least recently used leaving first.
    """

    def __init__(self, path: str | os.PathLike, *, cache_mb: int = 1024):
        self.path = Path(path)
        self.cache_mb = cache_mb
        if str(self.path) == ".":
            raise FileNotFoundError("data.path is empty; name the directory that launch.collect wrote")
        self._reader = open_reader(self.path)
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, EncodedEpisode] = collections.OrderedDict()
        self._cached_bytes = 0

    @property
    def schema(self) -> DatasetSchema:
        """What the data set holds."""
        return self._reader.schema

    def __len__(self) -> int:
        return len(self._reader)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache_mb": self.cache_mb}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], cache_mb=state["cache_mb"])

    def episode(self, number: int) -> EncodedEpisode:
        """Episode `number`, from the cache where it is there."""
        with self._lock:
            found = self._cache.get(number)
            if found is not None:
                self._cache.move_to_end(number)
                return found
        # Outside the lock: two threads may read the same record, none waits for another's disk.
        found = self.read(number)
        with self._lock:
            if number not in self._cache:
                self._cache[number] = found
                self._cached_bytes += found.nbytes
            while self._cached_bytes > self.cache_mb * 2**20 and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return found

    def read(self, number: int) -> EncodedEpisode:
        """Episode `number` from the disk, past the cache: for one pass over everything."""
        return self._reader.read(number)

    def fingerprint(self) -> str:
        """Changes when other data are written."""
        return self._reader.fingerprint()
