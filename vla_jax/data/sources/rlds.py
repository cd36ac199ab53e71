"""Writes episodes as a TFDS data set in RLDS layout, in array_record files, without TensorFlow.

RLDS (Ramos et al. 2021, arXiv:2111.02767): an episode is a nested data set `steps` and `episode_metadata`.
`tfds.builder_from_directory(directory).as_data_source("train")` reads the result. A directory holds

    schema.json            written first: names and sizes of everything recorded, number of shards
    arguments.json         how it was collected, if the caller says so
    NAME-train.array_record-00000-of-00008 …
    checksums.json         of the shards: their sizes alone tell little, array_record pads to 64 KiB
    features.json, dataset_info.json   written last: without dataset_info.json a data set is half-written

Shards are written by any number of processes in any order, each atomically; a stopped collection goes on with
`missing_shards`. Images are handed to TFDS as PNG bytes, because its own encoder needs TensorFlow.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # a binary
from etils import epath
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from vla_jax.data.schema import METADATA, DatasetSchema, Episode
from vla_jax.files import read_json

SPLIT = "train"
SCHEMA_FILE = "schema.json"
ARGUMENTS_FILE = "arguments.json"
CHECKSUMS_FILE = "checksums.json"
INFO_FILE = "dataset_info.json"

WITHOUT_ARGUMENTS = (
    "it only says how the collection was begun: remove this file, then the same command goes on"
)


def features(schema: DatasetSchema) -> tfds.features.FeaturesDict:
    """The TFDS features of a schema: one Image per camera beside `state`, both under `observation`."""
    observation: dict[str, Any] = {
        camera: tfds.features.Image(shape=(*size, 3), encoding_format="png")
        for camera, size in schema.cameras.items()
    }
    observation["state"] = tfds.features.Tensor(shape=(len(schema.state_names),), dtype=np.float32)
    scalars = {int: np.int64, bool: np.bool_}
    metadata = {
        key: tfds.features.Text() if kind is str else tfds.features.Scalar(dtype=scalars[kind])
        for key, (kind, _) in METADATA.items()
    }
    step = {
        "observation": tfds.features.FeaturesDict(observation),
        "action": tfds.features.Tensor(shape=(len(schema.action_names),), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "text_target": tfds.features.Text(),
        **{flag: tfds.features.Scalar(dtype=np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
    }
    return tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": tfds.features.FeaturesDict(metadata)}
    )


def shard_path(out_dir: str | os.PathLike, schema: DatasetSchema, shard: int, num_shards: int) -> Path:
    """Where a shard lies, in TFDS's naming."""
    return Path(out_dir) / f"{schema.name}-{SPLIT}.array_record-{shard:05d}-of-{num_shards:05d}"


def prepare_directory(
    out_dir: str | os.PathLike,
    schema: DatasetSchema,
    num_shards: int,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Make the directory, or check that what is there was begun with the same schema, shards and arguments.

    Safe to call from several processes. Raises ValueError naming what differs.
    """
    out_dir = Path(out_dir)
    if num_shards < 1:
        raise ValueError(f"num_shards={num_shards}: must be at least 1")
    out_dir.mkdir(parents=True, exist_ok=True)
    wanted = {"schema": schema.to_json(), "num_shards": num_shards}
    if not (out_dir / SCHEMA_FILE).exists():
        write_atomically(out_dir / SCHEMA_FILE, json.dumps(wanted, indent=2).encode())
    found, shards = read_schema(out_dir)
    if found != schema:
        raise ValueError(f"{out_dir} holds another schema (there against here): {found.difference(schema)}")
    if shards != num_shards:
        raise ValueError(f"{out_dir} was begun with {shards} shards, not {num_shards}; use {shards}")
    if arguments is None:
        return
    path = out_dir / ARGUMENTS_FILE
    if not path.exists():
        write_atomically(path, json.dumps(dict(arguments), indent=2, sort_keys=True).encode())
    before, now = read_json(path, mend=WITHOUT_ARGUMENTS), json.loads(json.dumps(dict(arguments)))
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        what = ", ".join(f"{key}={before.get(key)!r} not {now.get(key)!r}" for key in differing)
        raise ValueError(
            f"{out_dir} was begun with other arguments ({what}); repeat those or use another directory"
        )


def read_schema(directory: str | os.PathLike) -> tuple[DatasetSchema, int]:
    """Schema and number of shards of a (possibly unfinished) data set."""
    path = Path(directory) / SCHEMA_FILE
    try:
        values = json.loads(path.read_text())
        return DatasetSchema.from_json(values["schema"]), int(values["num_shards"])
    except FileNotFoundError:
        raise FileNotFoundError(f"no data set in {directory} ({SCHEMA_FILE} is missing)") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a data set's schema: {error}") from None


def encode_png(image: np.ndarray) -> bytes:
    """A u8[h w 3] image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)  # half the time of the default 6, 5 % larger
    return buffer.getvalue()


def serialize(schema: DatasetSchema, episode: Episode) -> bytes:
    """An episode as the bytes of a tf.train.Example in RLDS layout."""
    return _serialize(features(schema), schema, episode)


def write_shard(
    out_dir: str | os.PathLike,
    schema: DatasetSchema,
    shard: int,
    num_shards: int,
    episodes: Iterable[Episode],
) -> int:
    """Write one shard and return its number of episodes; the file appears only when it is whole.

    Episodes are taken one by one, so a generator keeps memory flat. If it raises, nothing is left behind.
    """
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard={shard}: must be in [0, {num_shards})")
    prepare_directory(out_dir, schema, num_shards)
    target = shard_path(out_dir, schema, shard, num_shards)
    # A name of its own, so that a killed process's rest never meets another's; not TFDS's pattern.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    layout, count = features(schema), 0
    try:
        # group_size:1 stores every episode by itself: reading one never decompresses its neighbours.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for episode in episodes:
                try:
                    record = _serialize(layout, schema, episode)
                except ValueError as error:
                    raise ValueError(f"episode {count} of shard {shard}: {error}") from None
                _on_disk(target, writer.write, record)
                count += 1
        finally:
            _on_disk(target, writer.close)
        if count == 0:
            raise ValueError(f"shard {shard} of {out_dir} got no episodes; use fewer shards")
        (Path(out_dir) / INFO_FILE).unlink(missing_ok=True)  # it counts the episodes of the old shard
        _publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def missing_shards(out_dir: str | os.PathLike, schema: DatasetSchema, num_shards: int) -> tuple[int, ...]:
    """The shards that are still to be written; all of them for a directory that does not exist."""
    if (Path(out_dir) / SCHEMA_FILE).exists():
        prepare_directory(out_dir, schema, num_shards)
    return tuple(s for s in range(num_shards) if not shard_path(out_dir, schema, s, num_shards).exists())


def finalize(out_dir: str | os.PathLike, schema: DatasetSchema, num_shards: int) -> int:
    """Write the metadata that makes the directory a data set; returns its number of episodes."""
    out_dir = Path(out_dir)
    missing = missing_shards(out_dir, schema, num_shards)
    if missing:
        raise ValueError(
            f"{out_dir} is half-written: {len(missing)} of {num_shards} shards are missing {missing}"
        )
    paths = [shard_path(out_dir, schema, shard, num_shards) for shard in range(num_shards)]
    lengths = [_count_records(path) for path in paths]
    info = dataset_info(out_dir, schema, lengths, num_bytes=sum(path.stat().st_size for path in paths))
    checksums = {path.name: _checksum(path) for path in paths}
    write_atomically(out_dir / CHECKSUMS_FILE, json.dumps(checksums, indent=2).encode())
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".metadata-") as temporary:
        info.write_to_directory(temporary)
        names = sorted((path.name for path in Path(temporary).iterdir()), key=lambda name: name == INFO_FILE)
        for name in names:  # dataset_info.json comes last: it says that the rest is there
            _publish(Path(temporary) / name, out_dir / name)
    for rest in out_dir.glob(f".{schema.name}-{SPLIT}.*.tmp"):
        rest.unlink()  # of writers that were killed
    return sum(lengths)


def dataset_info(
    directory: Path, schema: DatasetSchema, shard_lengths: list[int], *, num_bytes: int
) -> tfds.core.DatasetInfo:
    """TFDS's description of a data set in `directory`, of nothing but its schema and its shards' lengths."""
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=shard_lengths,
        num_bytes=num_bytes,
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=schema.name,
            data_dir=epath.Path(directory),
            split=SPLIT,
            filetype_suffix="array_record",
        ),
    )
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(
            name=schema.name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
        ),
        features=features(schema),
        description=f"{schema.robot} demonstrations in RLDS layout",
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict([split]))
    return info


def _serialize(layout: tfds.features.FeaturesDict, schema: DatasetSchema, episode: Episode) -> bytes:
    episode.check(schema)
    length = len(episode)
    last = length - 1
    targets = episode.text_target
    targets = [targets] * length if isinstance(targets, str) else targets
    metadata = {key: episode.metadata.get(key, default) for key, (_, default) in METADATA.items()}
    steps = [
        {
            "observation": {
                **{camera: encode_png(episode.images[camera][t]) for camera in schema.cameras},
                "state": episode.state[t],
            },
            "action": episode.action[t],
            "language_instruction": episode.language_instruction,
            "text_target": targets[t],
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last and bool(metadata["success"]),
        }
        for t in range(length)
    ]
    example = layout.encode_example({"steps": steps, "episode_metadata": metadata})
    specs: Any = layout.get_serialized_info()
    record = ExampleSerializer(specs).get_tf_example(example)
    return record.SerializeToString(
        deterministic=True
    )  # else the order of its features differs from run to run


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_disk(target: Path, write: Callable[..., None], *record: bytes) -> None:
    """array_record reports a full disk as a RuntimeError with its own file names in it."""
    try:
        write(*record)
    except RuntimeError as error:
        reason = str(error).split(";")[0]
        raise OSError(f"cannot write {target} ({reason}); make room and run the same command again") from None


def _count_records(path: Path) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it from a copy, or delete it and write its episodes once more "
            "with what wrote the data set"
        ) from None
    if count == 0:
        raise ValueError(
            f"{path} holds no episodes; restore it from a copy, or write the data set without it"
        )
    return count


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all, also after a crash."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        _publish(Path(temporary), path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _publish(temporary: Path, target: Path) -> None:
    """Rename once the content is on the disk, and the rename too: a crash leaves the old state or the new."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
