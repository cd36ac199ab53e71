"""A checksum of a tree of arrays that does not depend on how the arrays are sharded.

Orbax notices missing and truncated files, but not a flipped bit in an array. So the sum, modulo 2³², of every
array's words is saved beside it and compared after restoring. Integer addition is associative: any number of
devices gives the same result. It costs one pass over the memory.
"""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from vla_jax.sharding import distributed

FACTOR, MODULUS = 31, 2**32
"""The factor tells two exchanged arrays apart."""


def fingerprint(tree: Any) -> int:
    """The checksum of all arrays of the tree; on several hosts, call it on all of them."""
    leaves = jax.tree.leaves(tree)
    if not all(_lies_on_the_host(leaf) for leaf in leaves):
        return int(_fingerprint(leaves))
    total = 0
    for words in _sums(leaves):
        total = (total * FACTOR + words) % MODULUS
    return total


@jax.jit
def _fingerprint(leaves: list[Array]) -> UInt32[Array, ""]:
    total = jnp.uint32(0)
    for leaf in leaves:
        total = total * jnp.uint32(FACTOR) + _words(leaf)
    return total


def _words(x: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        x = jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def _lies_on_the_host(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.sharding.device_set)


def _sums(leaves: list[Any]) -> list[int]:
    """The sum of each array's words. XLA's CPU programs would copy an array, widened, before they sum it."""
    sums = [sum(map(_host_words, _own_parts(leaf))) for leaf in leaves]
    mine = [not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves]
    if all(mine):
        return sums
    everyone = zip(*(json.loads(text) for text in distributed.gather("checksums", json.dumps(sums))))
    return [own if alone else sum(parts) for own, alone, parts in zip(sums, mine, everyone)]


def _own_parts(leaf: Any) -> Iterator[np.ndarray]:
    """What of an array this process counts: all processes together count everything once."""
    if not isinstance(leaf, jax.Array):
        yield np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data)


def _host_words(x: np.ndarray) -> int:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        x = (
            np.ascontiguousarray(x)
            .reshape(-1)
            .view({2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize])
        )
    else:
        x = x.astype(np.uint32)
    return int(np.sum(x, dtype=np.uint32))
