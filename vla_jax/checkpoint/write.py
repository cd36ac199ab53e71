"""How arrays lie in a checkpoint's files, and how much memory it may take to bring them there.

While a save runs, the arrays' copies on the host take their own size; everything beyond is bounded here.

- Arrays are not compressed: the compressed bytes would all be held until they are written (another copy of the
  state), and trained weights in float32 hardly shrink.
- TensorStore copies what it cannot write as it lies in memory, pieces of stacked layers for one. Each item has
  `AT_ONCE` bytes, or its largest shard, in writing at a time; and files end at `FILE_BYTES`.
- The C library keeps what is freed; `give_back` has it returned.
"""

import ctypes
import math
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

CHUNK_BYTES = 64 * 2**20
"""Largest chunk of a file: whoever wants one layer of a stack reads so much, not gigabytes."""

LAYER_BYTES = 2**16
"""A layer of a stack with at least so many bytes on one device is a chunk of its own. Every chunk costs a request, a
key in the index and memory while it is written: a vector in chunks of one number each took gigabytes."""

FILE_BYTES = 128 * 2**20
"""About the size of a file: what was copied to be written is held until its file is full."""

AT_ONCE = 256 * 2**20
"""Bytes of an item that are being written at a time, where its largest shard has fewer."""


class ArraysHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees, with the bounds above; what it writes, Orbax's own handlers read."""

    def __init__(self):
        super().__init__(use_compression=False)

    async def async_save(self, directory: Any, args: Any) -> Any:
        """Starts to save one item's tree; see Orbax's."""
        largest = max(map(shard_bytes, jax.tree.leaves(args.item)), default=0)
        bounded = ocp.BasePyTreeCheckpointHandler(
            save_concurrent_bytes=max(AT_ONCE, largest) + 1,  # a shard must be below it
            use_compression=False,
        )
        return await ocp.PyTreeCheckpointHandler(handler_impl=bounded).async_save(directory, args=args)

    @classmethod
    def typestr(cls) -> str:
        """The name in the checkpoint's metadata: that of Orbax's handler, so that others can read it."""
        return ocp.PyTreeCheckpointHandler.typestr()


def registry() -> ocp.handlers.CheckpointHandlerRegistry:
    """For a `CheckpointManager`: trees given as `arrays` are written so."""
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(None, ocp.args.PyTreeSave, ArraysHandler())
    return handlers


def arrays(tree: Any) -> ocp.args.PyTreeSave:
    """What to give to `CheckpointManager.save` for an item."""
    saving = jax.tree.map(_chunks, tree)
    return ocp.args.PyTreeSave(tree, save_args=saving, ocdbt_target_data_file_size=FILE_BYTES)


def give_back() -> None:
    """Returns what a save has freed to the system, before the next one needs as much again.

    glibc keeps freed arrays below 32 MiB, apart for every thread that made some: over a few saves these grew to twice
    the state. Other C libraries have no such function; nothing is done there.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def shard_bytes(x: jax.Array) -> int:
    """Bytes of the part of an array that one device has."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _chunks(x: jax.Array) -> ocp.SaveArgs:
    layers = x.sharding.shard_shape(x.shape)[0] if x.ndim >= 3 else 0
    stacked = layers > 0 and shard_bytes(x) // layers >= LAYER_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
