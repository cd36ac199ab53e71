"""Writers that hold one piece of one array at a time, and `place`, which puts arrays on a mesh one by one.

A folder gets its name only when it is whole.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from vla_jax.checkpoint.tree import nest
from vla_jax.convert.entry import Lazy
from vla_jax.convert.sources import DTYPES, INDEX
from vla_jax.types import PyTree

#: Bytes of a chunk on the disk: what is read at least of an array, and what is compressed at once.
CHUNK_BYTES = 32 * 2**20


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Lazy` arrays as orbax writes numpy's, one after the other."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Lazy, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        tspec = dict(tspec, metadata=dict(tspec["metadata"], chunks=_chunks(value)))
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for index, piece in value.pieces():
            store[index].write(np.ascontiguousarray(piece)).result()  # not awaited: the next one must wait


def lazy_handler() -> ocp.PyTreeCheckpointHandler:
    """An orbax handler for trees of `Lazy` arrays; any orbax reads what it writes."""
    registry = ocp.type_handlers.create_type_handler_registry((Lazy, _LazyHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def write_orbax(path: Path, arrays: Mapping[str, Lazy], root: tuple[str, ...] = ()) -> None:
    """A folder of orbax with the arrays as a tree, below the keys of `root`."""
    tree = nest(arrays)
    for key in reversed(root):
        tree = {key: tree}
    with ocp.Checkpointer(lazy_handler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))


def write_safetensors(folder: Path, arrays: Mapping[str, Lazy], max_bytes: int) -> None:
    """``model.safetensors``, or several files of at most `max_bytes` each (one array at least) and their index."""
    shards: list[dict[str, Lazy]] = [{}]
    for name, lazy in arrays.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + lazy.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = lazy
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(lazy.nbytes for lazy in arrays.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def place(arrays: Mapping[str, Lazy], shardings: Mapping[str, jax.sharding.Sharding]) -> PyTree:
    """The arrays on their devices, as a tree: the host holds one of them at a time, a device only its shards."""
    placed = {}
    for name, lazy in arrays.items():
        whole = np.empty(lazy.shape, lazy.dtype)
        for index, piece in lazy.pieces():
            whole[index] = piece
        placed[name] = jax.make_array_from_callback(lazy.shape, shardings[name], whole.__getitem__)
        jax.block_until_ready(placed[name])
        del whole
    return nest(placed)


class Whole:
    """A new folder that appears under its name only when the block has ended without an error."""

    def __init__(self, path: Path):
        if path.exists():
            raise FileExistsError(f"{path} is there already; give another folder, or remove it")
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.partial.rename(self.path)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def _write_shard(file: Path, arrays: Mapping[str, Lazy]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, lazy in arrays.items():
        header[name] = {
            "dtype": names[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [end, end + lazy.nbytes],
        }
        end += lazy.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for lazy in arrays.values():
            for _, piece in lazy.pieces():
                stream.write(
                    np.ascontiguousarray(piece).data.cast("B")
                    if piece.dtype.kind != "V"
                    else np.ascontiguousarray(piece).view(np.uint8).data
                )


def _chunks(value: Lazy) -> list[int]:
    """Leading axes are cut first, so that the layers of a stack lie apart."""
    chunks, item = list(value.shape), value.dtype.itemsize
    for axis in range(len(chunks)):
        rest = int(np.prod(chunks[axis + 1 :])) * item
        chunks[axis] = max(1, min(chunks[axis], CHUNK_BYTES // max(1, rest)))
        if rest <= CHUNK_BYTES:
            break
    return chunks
