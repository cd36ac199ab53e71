"""The gradient of each loss by itself, from one forward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair


def per_loss(losses: Callable[[Any], Any], params: Any) -> tuple[Pair, Any]:
    """Gradients of `losses(params).text` and `.action`, and all that `losses` returned.

    The forward pass is run once, and pulled back twice: with the cotangents (1, 0) and (0, 1).
    """

    def both(params):
        found = losses(params)
        return Pair(found.text, found.action), found

    values, pull_back, found = jax.vjp(both, params, has_aux=True)
    one, zero = jnp.ones_like(values.text), jnp.zeros_like(values.text)
    (text,), (action,) = pull_back(Pair(one, zero)), pull_back(Pair(zero, one))
    return Pair(text, action), found
