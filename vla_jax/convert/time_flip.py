"""Their clock and ours. Here t = 0 is noise and t = 1 data; in π0's public code s = 1 is noise, so s = 1 - t.

Two places of the expert carry the clock:

- `action_out_proj` predicts u = ε - a there and v = a - ε here: kernel and bias change sign, exactly, both ways;
- the layer that reads the time embedding. On the way in it is left as it is: the model gets
  ``expert.clock="reversed"`` and embeds 1 - t, so nothing rounds and every round trip is bit for bit the same, after
  training too. Only a model that was built here with a clock that runs forward needs more on the way out: its rows
  that read the time (the last of `action_time_mlp_in` for π0, all of `time_mlp_in` for π0.5) are reflected. With
  frequencies w, sin(w(1-t)) and cos(w(1-t)) are a reflection of sin(wt), cos(wt); that rounds, in float32 to 6e-8 of a
  pair's length.

Everything else, the noisy chunk included, is the same on both clocks.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.experts.time import embed_time

Flip = Callable[[np.ndarray], np.ndarray]


def flips(config: JointConfig) -> dict[str, Flip]:
    """What to do with which of our leaves; each function is its own inverse, the reflection up to rounding."""
    reader = "time_mlp_in" if config.time == "adarms" else "action_time_mlp_in"
    found: dict[str, Flip] = {
        "expert/action_out_proj/kernel": negate,
        "expert/action_out_proj/bias": negate,
    }
    if config.clock == "forward":
        found[f"expert/{reader}/kernel"] = functools.partial(reflect, width=config.width)
    return found


def negate(x: np.ndarray) -> np.ndarray:
    """Negates a layer's kernel or bias: velocities change their sign when time runs backwards."""
    return -x


def reflect(kernel: np.ndarray, *, width: int) -> np.ndarray:
    """The kernel [in, out] whose last `width` rows read the embedding of 1 - t instead of that of t.

    sin(w - wt) = sin w cos wt - cos w sin wt and cos(w - wt) = cos w cos wt + sin w sin wt, where sin w and cos w
    are the embedding of t = 1.
    """
    sin, cos = np.split(np.asarray(embed_time(jnp.ones(1, jnp.float32), width), np.float64)[0], 2)
    length = np.hypot(sin, cos)
    sin, cos = (sin / length)[:, None], (cos / length)[:, None]
    out = kernel.astype(np.float64)
    reads_sin, reads_cos = np.split(out[-width:], 2)
    out[-width:] = np.concatenate([sin * reads_cos - cos * reads_sin, sin * reads_sin + cos * reads_cos])
    return out.astype(kernel.dtype)
