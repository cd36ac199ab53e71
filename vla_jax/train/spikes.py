"""Spikes: steps whose loss or gradient norm is far outside of what the last steps had are left out.

With the mean μ and the standard deviation s of the last `window` values, a step is a spike where

    loss > μ_loss + sigma · s_loss    or    norm > μ_norm + sigma · s_norm,

where s is at least 2⁻¹⁶ |μ|, once half of the window is filled (OLMo, arXiv:2501.00656 §3.1, with sigma 6 and window
128). Spikes are remembered like all other finite values, so that a lasting change of level is soon accepted. Not-finite
steps are not.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.train.config import LoopConfig
from vla_jax.types import PyTree


def empty(window: int) -> PyTree:
    """What is remembered before the first step; boxed, like parameters: every device holds it whole."""
    nothing = nn.LogicallyPartitioned(jnp.zeros((2, window), jnp.float32), (None, None))
    return {"values": nothing, "count": jnp.zeros((), jnp.int32)}


def first(loop: LoopConfig) -> Callable[[], PyTree | None]:
    """What makes the memory of a run: None where spikes are not looked for."""
    return lambda: empty(loop.spike_window) if loop.spike_sigma else None


def is_spike(
    remembered: PyTree, loss: Float[Array, ""], norm: Float[Array, ""], sigma: float
) -> Bool[Array, ""]:
    """Whether a step is to be left out."""
    values, count = remembered["values"], remembered["count"]
    window = values.shape[1]
    valid = jnp.arange(window) < count
    filled = jnp.maximum(jnp.minimum(count, window), 1)
    mean = jnp.sum(values, axis=1, where=valid) / filled
    variance = jnp.sum((values - mean[:, None]) ** 2, axis=1, where=valid) / filled
    # A loss that stands still up to its rounding has no spread to be outside of.
    spread = jnp.maximum(jnp.sqrt(variance), 2.0**-16 * jnp.abs(mean))
    above = jnp.stack([loss, norm]) > mean + sigma * spread
    return (count >= window // 2) & jnp.any(above)


def remember(remembered: PyTree, loss: Float[Array, ""], norm: Float[Array, ""]) -> PyTree:
    """With one more step, the oldest forgotten; unchanged where the step was not finite."""
    values, count = remembered["values"], remembered["count"]
    new = {"values": values.at[:, count % values.shape[1]].set(jnp.stack([loss, norm])), "count": count + 1}
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, remembered)
