"""Their clock and ours. Here t = 0 is noise and t = 1 data; in π0's public code s = 1 is noise, so s = 1 - t.

Two leaves of the expert carry the clock, and both are changed on the way in and back on the way out:

- `action_out_proj` predicts u = ε - a there and v = a - ε here: kernel and bias change sign, exactly;
- the layer that reads the time embedding (`action_time_mlp_in`, rows below the action's, for π0; `time_mlp_in` for
  π0.5). With frequencies w, sin(w(1-t)) and cos(w(1-t)) are a reflection of sin(wt), cos(wt), so the rows of each
  frequency's pair are reflected, and the network is told our t.

Everything else, the noisy chunk included, is the same on both clocks. A reflection rounds: in float32 it is right to
6e-8 of the pair's length, and what went in can't be recovered from what came out. So the original rows are kept
beside an import and given back on export where training has not changed the reflected ones.
"""

import functools
from collections.abc import Callable

import numpy as np

from vla_jax.models.config import ExpertConfig
from vla_jax.models.experts.joint import embed_time

Flip = Callable[[np.ndarray], np.ndarray]


def flips(config: ExpertConfig) -> dict[str, Flip]:
    """What to do with which of our leaves; each function is its own inverse, up to rounding."""
    reader = "time_mlp_in" if config.time == "adarms" else "action_time_mlp_in"
    return {
        "expert/action_out_proj/kernel": negate,
        "expert/action_out_proj/bias": negate,
        f"expert/{reader}/kernel": functools.partial(reflect, width=config.width),
    }


def time_leaf(config: ExpertConfig) -> str:
    """The leaf whose flip rounds."""
    return f"expert/{'time_mlp_in' if config.time == 'adarms' else 'action_time_mlp_in'}/kernel"


def negate(x: np.ndarray) -> np.ndarray:
    """-x."""
    return -x


def reflect(kernel: np.ndarray, *, width: int) -> np.ndarray:
    """The kernel [in, out] whose last `width` rows read the embedding of 1 - t instead of that of t.

    sin(w - wt) = sin w cos wt - cos w sin wt and cos(w - wt) = cos w cos wt + sin w sin wt, where sin w and cos w
    are the embedding of t = 1.
    """
    sin, cos = np.split(np.asarray(embed_time(np.ones(1, np.float32), width), np.float64)[0], 2)
    length = np.hypot(sin, cos)
    sin, cos = (sin / length)[:, None], (cos / length)[:, None]
    out = kernel.astype(np.float64)
    reads_sin, reads_cos = np.split(out[-width:], 2)
    out[-width:] = np.concatenate([sin * reads_cos - cos * reads_sin, sin * reads_sin + cos * reads_cos])
    return out.astype(kernel.dtype)
