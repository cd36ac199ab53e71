"""Whose noise it is: every robot draws from a key of its own, so that it does not matter who is asked beside it.

One key for several robots becomes `fold_in(key, row)` for each; with one key per robot each draws what it would draw
alone with that key, whatever the batch, its order and its size:

    policy.act(observation, keys)[r]  is  policy.act(take(observation, [r]), keys[r])[0]  up to rounding
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from vla_jax.flow.base import split

Keys = Key[Array, "*n"] | UInt32[Array, "*n words"]
"""One key, or one per robot: of `jax.random.key`, or the data that `jax.random.PRNGKey` gives."""


class Draws(NamedTuple):
    """Keys for the two things that a robot draws."""

    plan: Key[Array, "*b"]
    """For the text that it decodes first: one key, or [b], as they were given."""
    actions: Key[Array, " b"]
    """For the actions' noise: one key per robot, [b]."""


def typed(key: Keys) -> Key[Array, "*n"]:
    """A key of `jax.random.key`; one of `jax.random.PRNGKey` becomes it."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def check_keys(key: Keys, robots: int) -> Key[Array, "*n"]:
    """One key, or one per robot. Raises ValueError."""
    key = typed(key)
    if key.shape not in ((), (robots,)):
        raise ValueError(
            f"key has shape {list(key.shape)}: give one key, or one for each of the {robots} robots"
        )
    return key


@functools.partial(jax.jit, static_argnames="robots")
def robot_keys(key: Key[Array, "*n"], robots: int) -> Key[Array, " b"]:
    """Keys [b] of some robots: of one key by their rows, of a key each as though the robot were alone (row 0)."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in, (0, None))(key, 0)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(robots))


@jax.jit
def noise_keys(keys: Key[Array, " b"], step: Int[Array, ""] | int) -> Key[Array, " b"]:
    """Of episodes' keys [b], those of the prediction that looks at control step `step`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


@functools.partial(jax.jit, static_argnames="robots")
def draws(key: Key[Array, "*n"], robots: int) -> Draws:
    """What `act` draws from: the plan's key or keys as `plan` takes them, and the actions' keys [b]."""
    for_plan, for_actions = split(key, 2)
    return Draws(for_plan, robot_keys(for_actions, robots))
