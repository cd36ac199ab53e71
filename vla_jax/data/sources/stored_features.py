"""Opens a data set's directory without letting its files choose what is run.

`tfds.builder_from_directory` imports the module of every `pythonClassName` in features.json. With ``python -m`` the
current directory comes first among the places where modules are looked for, so a data set in ``data/NAME`` could bring
a module of its own. Here features.json is a list of classes that must stand in `CLASSES`, and records are
parsed by the features that schema.json gives.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource
from tensorflow_datasets.core.proto import feature_pb2

from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources import rlds

FEATURES_FILE = "features.json"
MAX_BYTES = 64 * 2**20
"""Largest JSON file that is read beside the records; ours have a few KiB."""

_protos: Any = feature_pb2
"""Generated code, whose classes are made when it is imported."""
_TFDS = "tensorflow_datasets.core.features"
CLASSES = {
    f"{_TFDS}.features_dict.FeaturesDict": "features_dict",
    f"{_TFDS}.dataset_feature.Dataset": "sequence",
    f"{_TFDS}.image_feature.Image": "image",
    f"{_TFDS}.tensor_feature.Tensor": "tensor",
    f"{_TFDS}.scalar.Scalar": "tensor",
    f"{_TFDS}.text_feature.Text": "text",
}
"""Classes that features.json may name, and the kind of content that each of them has. TFDS has another kind, JSON in a
string, whose features it imports in the same way: no class may have it."""


def open_records(path: Path, schema: DatasetSchema) -> Any:
    """Random access to a finished data set's episodes: parsed, with the steps as arrays and the images as bytes.

    Raises ValueError in one line where features.json names another class, or other features than the schema, and
    where a file is damaged.
    """
    features = _read_features(path)
    lengths = _shard_lengths(path)
    difference = _difference(rlds.features(schema), features)
    if difference:
        raise ValueError(f"{path} holds other features than its {rlds.SCHEMA_FILE} says: {difference}")
    info = rlds.dataset_info(path, schema, lengths, num_bytes=0)
    try:
        # Steps stay dense arrays, images stay bytes: one parse per episode, no decoding.
        split: Any = rlds.SPLIT  # declared as a class of its own; a name is taken
        return ArrayRecordDataSource(info, split=split, decoders={"steps": tfds.decode.SkipDecoding()})
    # TFDS and array_record raise whatever their layers raise.
    except Exception as error:
        raise ValueError(f"{path} is not a readable data set: {one_line(error)}") from error


def one_line(error: object) -> str:
    """An exception, or what stands for one, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def _read_features(path: Path) -> tfds.features.FeatureConnector:
    file = path / FEATURES_FILE
    content = _read_json(file)
    try:
        # What is checked is the message that TFDS builds from, not the text: JSON has two spellings for each field.
        message = json_format.ParseDict(content, _protos.Feature())
    except json_format.ParseError as error:
        raise ValueError(f"{file} is not of TFDS's features: {one_line(error)}") from None
    _check_classes(message, "", file)
    try:
        return tfds.features.FeatureConnector.from_proto(message)
    except Exception as error:  # TFDS's classes check their own content, each in its own way
        raise ValueError(f"{file} is not of TFDS's features: {one_line(error)}") from error


def _check_classes(feature: Any, name: str, file: Path) -> None:
    """Raises ValueError at the first feature whose class is not in `CLASSES`, or has another's content."""
    said, content = feature.python_class_name, feature.WhichOneof("content")
    if said not in CLASSES:
        known = ", ".join(sorted(known.rpartition(".")[2] for known in CLASSES))
        raise ValueError(
            f"{file} names the class {said[:80]!r} for {name or 'the record'}; only TFDS's own {known} are read, and "
            "no other module is imported"
        )
    if content != CLASSES[said]:
        raise ValueError(
            f"{file}: {name or 'the record'} is a {said.rpartition('.')[2]} with {content} in it"
        )
    if content == "features_dict":
        for key, inner in feature.features_dict.features.items():
            _check_classes(inner, f"{name}/{key}".strip("/"), file)
    elif content == "sequence":
        _check_classes(feature.sequence.feature, name, file)


def _shard_lengths(path: Path) -> list[int]:
    """Episodes of each shard, as dataset_info.json says."""
    file = path / rlds.INFO_FILE
    try:
        (split,) = (part for part in _read_json(file)["splits"] if part["name"] == rlds.SPLIT)
        lengths = [int(length) for length in split["shardLengths"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file} does not say how many episodes each shard of {rlds.SPLIT} holds") from None
    _, shards = rlds.read_schema(path)
    if len(lengths) != shards or not all(0 < length < 2**31 for length in lengths):
        raise ValueError(f"{file} lists shards of {lengths[:8]} episodes, {rlds.SCHEMA_FILE} {shards} shards")
    return lengths


def _read_json(file: Path) -> Any:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; such a file has some thousand")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({one_line(error)})") from None


def _difference(wanted: tfds.features.FeaturesDict, found: tfds.features.FeatureConnector) -> str:
    """The first feature that differs, in words; empty where none does."""
    want, have = (_flat(features.get_tensor_info()) for features in (wanted, found))
    for name in sorted({*want, *have}):
        if want.get(name) != have.get(name):
            return f"{name} is {have.get(name, 'absent')}, not {want.get(name, 'absent')}"
    return ""


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}/{name}").items()}
    return {prefix.removeprefix("/"): f"{np.dtype(tree.np_dtype)}{list(tree.shape)}"}
