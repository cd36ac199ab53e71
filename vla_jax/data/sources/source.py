"""Reads a data set's episodes through TFDS's data source; images stay PNG until a frame is asked for."""

import collections
import dataclasses
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vla_jax.data.schema import METADATA, DatasetSchema
from vla_jax.data.sources import rlds
from vla_jax.data.sources.stored_features import one_line, open_records


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """An episode whose images are still PNG; `frame` decodes one."""

    number: int
    """Its place in the data set."""
    state: Float[np.ndarray, "T q"]
    action: Float[np.ndarray, "T a"]
    png: dict[str, tuple[bytes, ...]]
    """Camera → one PNG per step."""
    language_instruction: str
    text_target: tuple[str, ...]
    """One per step."""
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.state)

    def frame(self, camera: str, step: int) -> UInt8[np.ndarray, "h w 3"]:
        """One camera's image at one step."""
        try:
            return np.asarray(Image.open(io.BytesIO(self.png[camera][step])))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"episode {self.number} step {step}: the image of camera {camera} cannot be decoded ({error})"
            ) from None

    @property
    def nbytes(self) -> int:
        """Memory of its content."""
        images = sum(len(image) for frames in self.png.values() for image in frames)
        return images + self.state.nbytes + self.action.nbytes


class EpisodeSource:
    """Random access to episodes, for many threads; pickled without its cache, reopened where it arrives.

    Parsing a record costs more than a sample, so parsed episodes are kept up to `cache_mb` megabytes, the
    least recently used leaving first.
    """

    def __init__(self, path: str | os.PathLike, *, cache_mb: int = 1024):
        self.path = Path(path)
        self.cache_mb = cache_mb
        self.schema, self._source = _open(self.path)
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, EncodedEpisode] = collections.OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._source)

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
        try:
            record = self._source[number]
            steps, metadata = record["steps"], record["episode_metadata"]
            texts: dict[bytes, str] = {}  # most steps share one string
            targets = tuple(texts.setdefault(text, text.decode()) for text in steps["text_target"])
            episode = EncodedEpisode(
                number=number,
                state=steps["observation"]["state"],
                action=steps["action"],
                png={camera: tuple(steps["observation"][camera]) for camera in self.schema.cameras},
                language_instruction=steps["language_instruction"][0].decode(),
                text_target=targets,
                metadata={
                    key: metadata[key].decode() if kind is str else kind(metadata[key])
                    for key, (kind, _) in METADATA.items()
                },
            )
        # The proto parser, the array reshape and array_record each have their own exception.
        except Exception as error:
            raise ValueError(_unreadable(self.path, number, error)) from error
        lengths = {len(episode.state), len(episode.action), len(targets), *map(len, episode.png.values())}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(_unreadable(self.path, number, f"its features have {sorted(lengths)} steps"))
        return episode

    def fingerprint(self) -> str:
        """Changes when other data are written: a hash of the metadata, of the checksums that `rlds.finalize` wrote,
        and of the shards' names and sizes. The shards themselves are not read, so it does not change with them.
        """
        digest = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            if path.name in (rlds.SCHEMA_FILE, rlds.CHECKSUMS_FILE, rlds.INFO_FILE):
                digest.update(path.read_bytes())
            elif path.name.startswith(f"{self.schema.name}-{rlds.SPLIT}."):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def _open(path: Path) -> tuple[DatasetSchema, Any]:
    if str(path) == ".":
        raise FileNotFoundError("data.path is empty; name the directory that launch.collect wrote")
    try:
        schema, shards = rlds.read_schema(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; make one with python -m launch.collect --out {path}") from None
    missing = rlds.missing_shards(path, schema, shards)
    if missing or not (path / rlds.INFO_FILE).exists():
        raise ValueError(
            f"{path} is half-written ({shards - len(missing)} of {shards} shards); "
            "run the same launch.collect command again to finish it"
        )
    return schema, open_records(path, schema)


def _unreadable(path: Path, number: int, reason: object) -> str:
    return (
        f"episode {number} of {path} cannot be read ({one_line(reason)}); restore the file from a copy, or write the "
        "data set without it"
    )
