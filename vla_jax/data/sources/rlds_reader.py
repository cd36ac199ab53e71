"""Reads data sets in RLDS layout through TFDS's data source, without TensorFlow; `rlds` writes them."""

import hashlib
from pathlib import Path
from typing import ClassVar

from vla_jax.data.schema import METADATA
from vla_jax.data.sources import rlds
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.stored_features import one_line, open_records


class RldsReader:
    """A finished data set of `launch.collect`; see `vla_jax.data.sources.Reader`."""

    sign: ClassVar[str] = rlds.SCHEMA_FILE

    def __init__(self, path: Path):
        self.path = path
        self.schema, shards = rlds.read_schema(path)
        missing = rlds.missing_shards(path, self.schema, shards)
        if missing or not (path / rlds.INFO_FILE).exists():
            raise ValueError(
                f"{path} is half-written ({shards - len(missing)} of {shards} shards); "
                "run the same launch.collect command again to finish it"
            )
        self._records = open_records(path, self.schema)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int) -> EncodedEpisode:
        """Episode `number` from the disk."""
        try:
            record = self._records[number]
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


def _unreadable(path: Path, number: int, reason: object) -> str:
    return (
        f"episode {number} of {path} cannot be read ({one_line(reason)}); restore the file from a copy, or write the "
        "data set without it"
    )
