"""Files of weights, opened so that any part of any array can be read alone. Damage is refused in one line."""

import json
import lzma
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
from etils import epath

from vla_jax.checkpoint.failures import first_line
from vla_jax.convert.entry import ArraySpec, Index, rows_of

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

MAX_ARRAY_BYTES = 2**35
"""More than any array of a network here: the largest of a π0 has 2.25 GiB. What claims more is not read."""
MAX_EXPANSION = 100
"""How often an archive's size its content may be; weights compress to a half at best, and zeros to a thousandth."""


class NpzSource:
    """An uncompressed or compressed numpy archive; the rows of an array must be asked for in order."""

    def __init__(self, path: Path):
        self.path = path
        self.specs: dict[str, ArraySpec] = {}
        self._member: tuple[str, int, Any] | None = None  # name, row to come next, stream
        try:
            self._zip = zipfile.ZipFile(path)
            members = self._zip.infolist()
            total, most = sum(m.file_size for m in members), MAX_EXPANSION * path.stat().st_size + 2**20
            if total > most:
                raise ValueError(f"it would expand from {path.stat().st_size} bytes to {total}")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in self.specs:
                    raise ValueError(f"{member.filename!r} is there twice, or no .npy")
                self.specs[name] = self._spec(name, member)
        except _UNREADABLE as error:
            raise ValueError(f"{path} is not a readable npz file ({first_line(error)})") from error

    def _spec(self, name: str, member: zipfile.ZipInfo) -> ArraySpec:
        """Shape and type, from the array's header alone; pickled objects are refused and never loaded."""
        with self._zip.open(member) as stream:
            shape, fortran, dtype = _npy_header(stream)
            begin = stream.tell()
        if fortran:
            raise ValueError(f"{name} is in Fortran order")
        if dtype.hasobject or dtype.names:
            raise ValueError(f"{name} holds Python objects or records, not numbers")
        spec = plausible(name, shape, dtype)
        if begin + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(
                f"{name} has {member.file_size - begin} bytes, not those of {dtype.name}{list(shape)}"
            )
        return spec

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The array, or rows of it."""
        spec = self.specs[name]
        rows = rows_of(index)
        start, stop = rows.start, rows.stop
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
        except _UNREADABLE as error:
            raise ValueError(f"{self.path} is damaged: {name} ({first_line(error)})") from error
        if len(data) != math.prod(shape) * spec.dtype.itemsize:
            raise ValueError(f"{self.path} is damaged: {name} ends too early")
        self._member = (name, stop, stream) if stop is not None else None
        return np.frombuffer(data, spec.dtype).reshape(shape)


_UNREADABLE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,  # of an encrypted member, and NotImplementedError of a method
    RecursionError,
    MemoryError,
    TypeError,
    SyntaxError,  # the header of a .npy is a Python literal, which numpy parses and does not evaluate
)


def plausible(name: str, shape: tuple[int, ...], dtype: np.dtype) -> ArraySpec:
    """The array's description, unless no network has such an array. Raises ValueError, before anything is allocated."""
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{name} of shape {list(shape)} has no elements")
    if math.prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} of shape {list(shape)} is larger than any array of a network here")
    return ArraySpec(shape, dtype)


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
        self.specs: dict[str, ArraySpec] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        listed = None
        if path.is_file():
            files = [path]
        elif (path / INDEX).is_file():
            listed = _weight_map(path / INDEX)
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
            rows = rows_of(index)
            offset += rows.start * row * spec.dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
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
            header = json.loads(
                stream.read(length)
            )  # of a length that safetensors has checked: 100 MB at most
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if listed is not None and listed.get(name) != file.name:
                raise ValueError(f"{file} holds {name}, which {INDEX} does not list there")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: {name} is of type {entry['dtype']}, which is not read here")
            try:
                self.specs[name] = plausible(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
            self._place[name] = (file, 8 + length + entry["data_offsets"][0])


class OrbaxSource:
    """A tree of arrays that orbax has saved; names are paths with slashes."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.path)).tree
            saved = _json(self.path / "_METADATA") if (self.path / "_METADATA").is_file() else {}
        except Exception as error:  # orbax raises many types for a folder that is none of its own
            raise ValueError(f"{path} is not a readable orbax folder ({first_line(error)})") from error
        self._driver = "zarr3" if saved.get("use_zarr3") else "zarr"
        self._ocdbt = (self.path / "manifest.ocdbt").is_file()
        self._keys: dict[str, str] = {}
        self._stores: dict[str, Any] = {}
        self.specs = {}
        try:
            for keys, leaf in _leaves(tree):
                name = "/".join(keys)
                self._keys[name] = ".".join(keys)
                self.specs[name] = plausible(name, tuple(leaf.shape), np.dtype(leaf.dtype))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a readable orbax folder ({first_line(error)})") from error

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
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({first_line(error)})") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Array → file beside the index. A name that leads out of the folder is refused."""
    found = _json(index)
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map")
    for name, file in listed.items():
        beside(index.parent, file, f"{index} lists {name!r} in")
    return listed


def beside(folder: Path, name: Any, said: str) -> Path:
    """A file in `folder` that another file there names; raises ValueError where the name leads elsewhere."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or set(name) & {"\0", "\\"}:
        raise ValueError(f"{said} {str(name)[:100]!r}, which is not the name of a file in the same folder")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights; raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says what the weights' shapes do not")
    found = _json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found
