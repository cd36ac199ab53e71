"""The checksum of checkpoints that have no `checksums.json`: one sum of an item's words, blind to their order.

Only read, never written. Arrays are weighed by powers of 31 in the tree's order, their words are not weighed at all.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.checkpoint.fingerprint import MODULUS, own_parts
from vla_jax.sharding import distributed

FACTOR = 31


def plain_sum(tree: Any) -> int:
    """The sum of a whole item; on several hosts, call it on all of them. Shards come to the host one at a time."""
    leaves = jax.tree.leaves(tree)
    sums = [sum(_words(part) for _, part in own_parts(leaf)) for leaf in leaves]
    shared = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves]
    if any(shared):
        everyone = zip(*(json.loads(text) for text in distributed.gather("plain sums", json.dumps(sums))))
        sums = [sum(parts) if ours else own for own, ours, parts in zip(sums, shared, everyone)]
    return fold(sums)


def fold(sums: list[int]) -> int:
    """One number of all arrays', in the tree's order."""
    total = 0
    for words in sums:
        total = (total * FACTOR + words) % MODULUS
    return total


def _words(x: np.ndarray) -> int:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        words = {2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
        x = np.ascontiguousarray(x).reshape(-1).view(words)
    else:
        x = x.astype(np.uint32)
    return int(np.sum(x, dtype=np.uint32))
