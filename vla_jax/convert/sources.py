"""Files of weights, opened so that any part of any array can be read alone. Damage is refused in one line."""

import json
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import tensorstore as ts

from vla_jax.checkpoint.read import first_line
from vla_jax.convert.entry import Index, Spec

#: safetensors' names of types.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

INDEX = "model.safetensors.index.json"


class NpzSource:
    """An uncompressed or compressed numpy archive; the rows of an array must be asked for in order."""

    def __init__(self, path: Path):
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._member: tuple[str, int, Any] | None = None  # name, row to come next, stream
        try:
            self._zip = zipfile.ZipFile(path)
            for member in self._zip.namelist():
                name = member.removesuffix(".npy")
                with self._zip.open(member) as stream:
                    shape, fortran, dtype = _npy_header(stream)
                if fortran:
                    raise ValueError(f"{name} is in Fortran order")
                self.specs[name] = Spec(shape, dtype)
        except (zipfile.BadZipFile, ValueError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a readable npz file ({first_line(error)})") from error

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The array, or rows of it."""
        spec = self.specs[name]
        start, stop = (0, None) if not index else (index[0].start, index[0].stop)
        if self._member is None or self._member[:2] != (name, start):
            stream = self._zip.open(f"{name}.npy")
            _npy_header(stream)
            stream.read(start * math.prod(spec.shape[1:]) * spec.dtype.itemsize)
        else:
            stream = self._member[2]
        shape = spec.shape if stop is None else (stop - start, *spec.shape[1:])
        try:
            data = stream.read(math.prod(shape) * spec.dtype.itemsize)
            if stop is None or stop == spec.shape[0]:
                stream.read(1)  # the end of the stream: now its checksum is compared
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.path} is damaged: {name} ({first_line(error)})") from error
        if len(data) != math.prod(shape) * spec.dtype.itemsize:
            raise ValueError(f"{self.path} is damaged: {name} ends too early")
        self._member = (name, stop, stream) if stop is not None else None
        return np.frombuffer(data, spec.dtype).reshape(shape)


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype == np.dtype("V2"):  # numpy writes bfloat16 without its name
        dtype = np.dtype(ml_dtypes.bfloat16)
    return shape, fortran, dtype


class SafetensorsSource:
    """One safetensors file, or the several that an index beside them lists."""

    def __init__(self, path: Path):
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        listed = None
        if path.is_file():
            files = [path]
        elif (path / INDEX).is_file():
            listed = _json(path / INDEX).get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{path / INDEX} has no weight_map")
            files = [path / name for name in sorted(set(listed.values()))]
        else:
            files = [path / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing" + ("" if listed is None else f"; {INDEX} lists it")
                )
            self._open(file, listed)
        if listed is not None and (absent := sorted(set(listed) - set(self.specs))):
            raise ValueError(f"{path / INDEX} lists {absent[0]}, which {listed[absent[0]]} does not hold")

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The array, or rows of it."""
        spec, (file, offset) = self.specs[name], self._place[name]
        shape, row = spec.shape, math.prod(spec.shape[1:])
        if index:
            offset += index[0].start * row * spec.dtype.itemsize
            shape = (index[0].stop - index[0].start, *shape[1:])
        data = np.fromfile(file, spec.dtype, math.prod(shape), offset=offset)
        if data.size != math.prod(shape):
            raise ValueError(f"{file} is damaged: {name} ends too early")
        return data.reshape(shape)

    def _open(self, file: Path, listed: dict[str, str] | None) -> None:
        try:
            with safetensors.safe_open(
                file, framework="numpy"
            ) as opened:  # checks the offsets and the length
                list(opened.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({first_line(error)})") from error
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if listed is not None and listed.get(name) != file.name:
                raise ValueError(f"{file} holds {name}, which {INDEX} does not list there")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: {name} is of type {entry['dtype']}, which is not read here")
            self.specs[name] = Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            self._place[name] = (file, 8 + length + entry["data_offsets"][0])


class OrbaxSource:
    """A tree of arrays that orbax has saved; names are paths with slashes."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self.path).tree
            saved = _json(self.path / "_METADATA") if (self.path / "_METADATA").is_file() else {}
        except Exception as error:  # orbax raises many types for a folder that is none of its own
            raise ValueError(f"{path} is not a readable orbax folder ({first_line(error)})") from error
        self._driver = "zarr3" if saved.get("use_zarr3") else "zarr"
        self._ocdbt = (self.path / "manifest.ocdbt").is_file()
        self._keys: dict[str, str] = {}
        self._stores: dict[str, Any] = {}
        self.specs = {}
        for keys, leaf in _leaves(tree):
            name = "/".join(keys)
            self._keys[name] = ".".join(keys)
            self.specs[name] = Spec(tuple(leaf.shape), np.dtype(leaf.dtype))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The array, or a part of it."""
        try:
            return np.asarray(self._store(name)[index].read().result())
        except Exception as error:
            raise ValueError(f"{self.path} is damaged: {name} ({first_line(error)})") from error

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            key = self._keys[name]
            kvstore: Any = {"driver": "file", "path": f"{self.path}/{key}/"}
            if self._ocdbt:
                kvstore = {"driver": "ocdbt", "base": f"file://{self.path}/", "path": f"{key}/"}
            spec = {"driver": self._driver, "kvstore": kvstore}
            self._stores[name] = ts.open(spec, open=True, read=True).result()
        return self._stores[name]


def _leaves(tree: Any, above: tuple[str, ...] = ()):
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _leaves(tree[key], (*above, str(key)))
    elif tree is not None:
        if not hasattr(tree, "shape"):
            raise ValueError(f"{'/'.join(above)} is not an array")
        yield above, tree


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON ({first_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights; raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says what the weights' shapes do not")
    found = _json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found
