"""The networks of the toy: the plain one of most tutorials, and one that is told what is known beforehand.

`Plain` is ``[x, t] -> 128 -> 128 -> 2``. `Informed` has three additions, each worth a good part of its accuracy:

- If the data were one Gaussian of its spread s, the answer would be linear in x. The network learns the rest,
  ``prediction = skip(t) x + scale(t) F(x, t)``, with F of unit size at every t (Karras et al. 2206.00364, section 5,
  there for x1; `precondition` has it for every prediction). Nothing is singular at either end.
- It sees where the data probably are, m = E[x1 | x] under that Gaussian, rather than only x: edges of the data stay
  where they are while t runs.
- It sees sines and cosines of m, each damped as its mean under the Gaussian's posterior N(m, w^2) is,
  ``E cos(k x1) = cos(k m) exp(-k^2 w^2 / 2)``: fine detail appears as the noise goes (Barron et al. 2103.13415 do
  so for pixels).

Classes are embedded, with one more row for "no class". Fields are ``field(x, t, label)``; MeanFlow's also takes the
end of the interval.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vla_jax.flow.paths import align
from vla_jax.flow.schedules import Schedule

Predicted = Literal["velocity", "eps", "x1", "v", "score"]


def precondition(
    schedule: Schedule, kind: Predicted, spread: float, t: Float[Array, "*t"]
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """(skip, scale): ``E[prediction | x] = skip x`` for data N(0, spread^2), and the std of what that leaves.

    score is sigma times the score, as `flow.diffusion` trains it. A velocity has no scale at t = 1 where sigma' is
    infinite.
    """
    alpha, sigma, s = schedule.alpha(t), schedule.sigma(t), spread
    total = alpha**2 * s**2 + sigma**2
    std = jnp.sqrt(total)
    if kind == "x1":
        return s**2 * alpha / total, s * sigma / std
    if kind == "eps":
        return sigma / total, -s * alpha / std
    if kind == "score":
        return -sigma / total, s * alpha / std
    if kind == "v":
        return alpha * sigma * (1 - s**2) / total, -s * (alpha**2 + sigma**2) / std
    d_alpha = schedule.d_alpha(t)
    skip = (d_alpha * alpha * s**2 + schedule.sigma_d_sigma(t)) / total
    return skip, s * (d_alpha * sigma - alpha * schedule.d_sigma(t)) / std


def waves(count: int, lowest: float, highest: float, directions: int = 4) -> Float[np.ndarray, "2 f"]:
    """Wave vectors: `count` lengths in geometric progression, in `directions` directions of the half circle."""
    angle = np.pi * np.arange(directions) / directions
    length = np.geomspace(lowest, highest, count)
    return np.stack([np.outer(length, np.cos(angle)), np.outer(length, np.sin(angle))]).reshape(2, -1)


def answer_of(network: nn.Module, params: Any, *inputs: Any, **rest: Any) -> Float[Array, "n ..."]:
    """What a network answers; Flax declares a second result too, which there is only where collections change."""
    answer = network.apply(params, *inputs, **rest)
    assert not isinstance(answer, tuple)
    return answer


class Plain(nn.Module):
    """``[x, t]`` through ReLU layers, as in the tutorials."""

    width: int = 128
    depth: int = 2
    classes: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b 2"],
        t: Float[Array, " b"],
        label: Int[Array, " b"],
        s: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b 2"]:
        """Predict; `label` counts where there are several classes, `s` is the end of MeanFlow's interval."""
        parts = [x, t[:, None]] + ([] if s is None else [s[:, None]])
        if self.classes > 1:
            parts.append(nn.Embed(self.classes + 1, 8)(label))
        h = jnp.concatenate(parts, axis=1)
        for _ in range(self.depth):
            h = nn.relu(nn.Dense(self.width)(h))
        return nn.Dense(2)(h)


class Informed(nn.Module):
    """``skip x + scale F``, F a SiLU network of damped waves of the probable data."""

    schedule: Schedule
    kind: Predicted
    spread: float
    width: int = 256
    depth: int = 3
    classes: int = 1
    waves: int = 12
    highest: float = 36.0
    """Finest wave, in radians per `spread`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b 2"],
        t: Float[Array, " b"],
        label: Int[Array, " b"],
        s: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b 2"]:
        """Predict; `label` counts where there are several classes, `s` is the end of MeanFlow's interval."""
        alpha, sigma = align(self.schedule.alpha(t), x), align(self.schedule.sigma(t), x)
        std = jnp.sqrt(alpha**2 * self.spread**2 + sigma**2)
        mean, doubt = self.spread * alpha / std**2 * x, sigma / std  # of the data's posterior, in spreads
        k = jnp.asarray(waves(self.waves, 0.7, self.highest), x.dtype)
        damping = jnp.exp(-jnp.square(doubt) * jnp.sum(k**2, axis=0) / 2)
        phase = mean @ k
        parts = [x / std, mean, doubt, jnp.log(doubt + 0.01) / 2]
        parts += [jnp.cos(phase) * damping, jnp.sin(phase) * damping]
        if s is not None:  # how much of the noise the interval removes
            parts += [align(s, x), align(s - t, x), jnp.log(align(self.schedule.sigma(s), x) + 0.01) / 2]
        if self.classes > 1:
            parts.append(nn.Embed(self.classes + 1, 16)(label))
        h = jnp.concatenate(parts, axis=1)
        for _ in range(self.depth):
            h = nn.silu(nn.Dense(self.width)(h))
        h = nn.Dense(2, kernel_init=nn.initializers.zeros)(h)
        skip, scale = precondition(self.schedule, self.kind, self.spread, align(t, x))
        return skip * x + scale * h
