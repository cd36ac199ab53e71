"""A checksum of a tree of arrays that does not depend on how the arrays are sharded.

Orbax notices missing and truncated files, but not a flipped bit in an array. So the sum, modulo 2³², of every
array's words is saved beside it and compared after restoring. Integer addition is associative: any number of
devices gives the same result. It costs one pass over the memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> int:
    """The checksum of all arrays of the tree; on several hosts, call it on all of them."""
    return int(_fingerprint(jax.tree.leaves(tree)))


@jax.jit
def _fingerprint(leaves: list[Array]) -> UInt32[Array, ""]:
    total = jnp.uint32(0)
    for leaf in leaves:
        total = total * jnp.uint32(31) + _words(leaf)  # the factor tells two exchanged arrays apart
    return total


def _words(x: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        x = jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
