"""A random key for each purpose, found by the purpose's name.

So no file has to know which children of a step's key another file has used, and a new draw does not change the others.
"""

import zlib

import jax
from jaxtyping import PRNGKeyArray

NUMBERS = {"action/noise": 0, "plan_visible": 1, "action/prefix": 2, "prompt_dropout": 3}
"""Purposes that had a number before they had a name. They keep it, so that a run that was begun then goes on with the
noise that it would have had; every other number comes from the name."""


def named(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The child of `key` for one purpose, e.g. ``action/noise``; a term's names begin with its own."""
    number = NUMBERS.get(name)
    return jax.random.fold_in(key, zlib.crc32(name.encode()) if number is None else number)
