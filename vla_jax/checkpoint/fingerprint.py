"""Checksums of arrays that do not depend on how the arrays are sharded, and see every exchange.

Orbax notices missing and truncated files, but neither a flipped bit in an array nor two exchanged blocks. So a checksum
of every array is saved beside it and compared after restoring:

    Σᵢ mix(wᵢ + i · STRIDE)  mod 2³²

wᵢ are the array's words (its elements' bits) and i their places in row-major order. `mix` (MurmurHash3's last step, by
Austin Appleby, public domain) maps 32 bits one to one and is not linear. One changed word always changes the sum;
exchanged words, two flipped signs and other changes of several words go unseen with a chance of about 2⁻³². In a sum
weighted by odd numbers instead, two flipped signs would always cancel: 2³¹ · (odd + odd) = 0. Sums of integers are
associative: any number of devices gives the same result. It costs one pass over the memory.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from vla_jax.sharding import distributed

STRIDE = 0x9E3779B9
"""2³² divided by the golden ratio: neighbours' places lie far apart."""

STEPS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
"""mix: x ^= x >> shift, x *= factor, for each; then x ^= x >> 16."""

MODULUS = 2**32

BLOCK, THREAD_WORDS = 2**15, 2**20
"""Words that the host mixes at a time, so that they stay in its cache, and those of one thread's task."""

Sums = dict[str, str]
"""Path of an array → its type, shape and checksum."""


def fingerprint(tree: Any) -> Sums:
    """The checksums of all arrays of a tree; on several hosts, call it on all of them.

    Paths are Orbax's: a tree that was restored as nested dicts and lists has those of the named tuples it was.
    """
    named = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    leaves = list(named.values())
    if all(lies_on_the_host(leaf) for leaf in leaves):
        sums = _add_up([_host_sum(leaf) for leaf in leaves], leaves)
    else:
        sums = [int(total) for total in jax.device_get(_device_sums(leaves))]
    return {name: describe(leaf, total) for (name, leaf), total in zip(named.items(), sums)}


def describe(leaf: Any, total: int) -> str:
    """A checksum with the array's type and shape, as it is saved."""
    return f"{np.dtype(leaf.dtype)}[{','.join(map(str, leaf.shape))}] {total % MODULUS:08x}"


def path_of(path: tuple[Any, ...]) -> str:
    """The keys of a leaf, joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def piece_sum(shape: tuple[int, ...], index: tuple[int | slice, ...], piece: np.ndarray) -> int:
    """What a piece adds to the checksum of an array of `shape`; `index` says where the piece lies in it.

    Slices have no steps; axes that the index leaves out are whole.
    """
    starts = [i if isinstance(i, int) else (i.start or 0) for i in index]
    starts += [0] * (len(shape) - len(starts))
    sizes = list(piece.shape)
    for axis, i in enumerate(index):
        if isinstance(i, int):
            sizes.insert(axis, 1)
    words = np.ascontiguousarray(piece).reshape(-1).view(_unsigned(piece.dtype))
    each = words.size // max(1, piece.size)
    with _threads(words.size) as run_all:
        blocks = _blocks(words, each, *_runs(shape, starts, sizes))
        return sum(run_all(lambda block: _mixed(*block), blocks)) % MODULUS


def _runs(shape: tuple[int, ...], starts: list[int], sizes: list[int]) -> tuple[np.ndarray, int]:
    """A piece in its own row-major order as runs of neighbours: their first places, and their common length."""
    whole = len(shape)
    while whole and sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    axis = max(0, whole - 1)  # the last axis that is cut; what follows it is whole
    inner = math.prod(shape[axis + 1 :])
    first = np.asarray((starts[axis] if shape else 0) * inner, np.int64)
    for a in range(axis):
        places = (starts[a] + np.arange(sizes[a], dtype=np.int64)) * math.prod(shape[a + 1 :])
        first = first + places.reshape((-1,) + (1,) * (axis - 1 - a))
    return first.reshape(-1), (sizes[axis] if shape else 1) * inner


def _blocks(
    words: np.ndarray, each: int, first: np.ndarray, run: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of words, and the place of each row's first word; `each` words make an element."""
    if not words.size:
        return
    run, first = run * each, first * each
    rows = max(1, THREAD_WORDS // run)
    words = words.reshape(first.size, run)
    for low in range(0, first.size, rows):
        for left in range(0, run, THREAD_WORDS):
            yield words[low : low + rows, left : left + THREAD_WORDS], first[low : low + rows] + left


@contextlib.contextmanager
def _threads(words: int) -> Iterator[Callable[..., Iterable[int]]]:
    """A `map` on all cores where there is enough to do; numpy computes without Python's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or words < 4 * THREAD_WORDS:
        yield map
        return
    with concurrent.futures.ThreadPoolExecutor(min(16, cores)) as pool:
        yield pool.map


def _mixed(words: np.ndarray, first: np.ndarray) -> int:
    """Σ mix(word + place · STRIDE) of [rows, run] words, of which each row's first one has its place in `first`."""
    rows, run = words.shape
    width = min(run, BLOCK)
    height = max(1, BLOCK // width)
    steps = np.arange(width, dtype=np.uint32) * np.uint32(STRIDE)
    x, y = np.empty((2, height, width), np.uint32)
    total = 0
    for low in range(0, rows, height):
        for left in range(0, run, width):
            block = words[low : low + height, left : left + width]
            a, b = x[: block.shape[0], : block.shape[1]], y[: block.shape[0], : block.shape[1]]
            places = ((first[low : low + height] + left) % MODULUS).astype(np.uint32) * np.uint32(STRIDE)
            a[...] = block
            a += steps[: block.shape[1]]
            a += places[:, None]
            for shift, factor in STEPS:
                a ^= np.right_shift(a, np.uint32(shift), out=b)
                a *= np.uint32(factor)
            a ^= np.right_shift(a, np.uint32(16), out=b)
            total += int(a.sum(dtype=np.uint32))
    return total


@jax.jit
def _device_sums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [_device_sum(leaf) for leaf in leaves]


def _device_sum(x: Array) -> UInt32[Array, ""]:
    """The same on devices: one fused pass, the words and places are never in memory."""
    unsigned = _unsigned(x.dtype)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
    place = functools.reduce(
        jnp.add,
        (
            jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            * jnp.uint32(math.prod(x.shape[axis + 1 :]) % MODULUS)
            for axis in range(x.ndim)
        ),
        jnp.uint32(0),
    )
    x = x.astype(jnp.uint32) + place * jnp.uint32(STRIDE)
    for shift, factor in STEPS:
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)


def _unsigned(dtype: Any) -> Any:
    """The type of an array's words."""
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[np.dtype(dtype).itemsize]


def lies_on_the_host(leaf: Any) -> bool:
    """Whether numpy can read the array where it is: XLA's CPU programs would copy it, widened, before they sum it."""
    return not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.sharding.device_set)


def own_parts(leaf: Any) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """What of an array this process counts, and where that lies: all processes together count everything once."""
    if not isinstance(leaf, jax.Array):
        yield (), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def _host_sum(leaf: Any) -> int:
    return sum(piece_sum(leaf.shape, index, part) for index, part in own_parts(leaf))


def _add_up(sums: list[int], leaves: Iterable[Any]) -> list[int]:
    """Every process's parts of the sums together."""
    mine = [not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves]
    if all(mine):
        return sums
    everyone = zip(*(json.loads(text) for text in distributed.gather("checksums", json.dumps(sums))))
    return [own if alone else sum(parts) for own, alone, parts in zip(sums, mine, everyone)]
