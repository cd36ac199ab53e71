"""The gradient of each loss by itself, from one forward pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Named
from vla_jax.types import PyTree

Found = TypeVar("Found")


def per_loss(
    losses: Callable[[PyTree], tuple[Named, Found]], params: PyTree
) -> tuple[dict[str, PyTree], Found]:
    """The gradient of each loss that `losses` names, and what else it returned.

    The forward pass is run once, and pulled back once for each loss, with the cotangent 1 for it and 0 for the others.
    """
    values, pull_back, found = jax.vjp(losses, params, has_aux=True)
    return {name: pull_back(one_hot(values, name))[0] for name in values}, found


def one_hot(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Zeros like `values`, but ones for `name`."""
    return {other: (jnp.ones_like if other == name else jnp.zeros_like)(x) for other, x in values.items()}
