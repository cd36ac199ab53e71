"""Exact marginals of a Gaussian mixture on any affine path: the noise-free truth that tests and figures use.

With data ``x1 ~ sum_k w_k N(m_k, diag s_k^2)``, ``x_t = alpha x1 + sigma eps`` is again a mixture, with means
``alpha m_k`` and variances ``C_k = alpha^2 s_k^2 + sigma^2``. Every conditional expectation is then a sum over
components; all are written so that they are finite at both ends of every schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vla_jax.flow.paths import align
from vla_jax.flow.schedules import CondOT, Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """Data law of m components in a dimensions, and what a perfect network would say about it. x is [b a]."""

    weights: Float[Array, " m"]
    means: Float[Array, "m a"]
    stds: Float[Array, "m a"]
    schedule: Schedule = dataclasses.field(default_factory=CondOT, metadata={"static": True})

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n a"]:
        """`n` data points."""
        which, noise = jax.random.split(key)
        k = jax.random.choice(which, self.weights.shape[0], (n,), p=self.weights)
        shape = (n, self.means.shape[1])
        return self.means[k] + self.stds[k] * jax.random.normal(noise, shape, self.means.dtype)

    def _components(self, x: Array, t: Array) -> tuple[Array, ...]:
        """Log joint [b m], score and data mean [b m a] of each component, and d(data mean)/dx, diagonal."""
        u = align(t, x)[..., None] if t.ndim else t
        alpha, variance = self.schedule.alpha(u), self.schedule.sigma(u) ** 2
        total = alpha**2 * self.stds**2 + variance
        offset = x[:, None, :] - alpha * self.means
        score = -offset / total
        log_joint = jnp.log(self.weights) + jnp.sum(
            -jnp.square(offset) / total / 2 - jnp.log(2 * jnp.pi * total) / 2, axis=-1
        )
        gain = alpha * self.stds**2 / total
        return log_joint, score, self.means + gain * offset, jnp.broadcast_to(gain, score.shape), total

    def log_prob(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, " b"]:
        """log p_t(x)."""
        return jax.nn.logsumexp(self._components(x, t)[0], axis=-1)

    def log_posterior(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, "b m"]:
        """log p(component | x_t = x): the perfect classifier of a noisy sample."""
        return jax.nn.log_softmax(self._components(x, t)[0], axis=-1)

    def score(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, "b a"]:
        """grad log p_t(x)."""
        log_joint, score, *_ = self._components(x, t)
        return jnp.einsum("bm,bma->ba", jax.nn.softmax(log_joint), score)

    def eps(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, "b a"]:
        """E[eps | x_t = x] = -sigma score."""
        return -self.schedule.sigma(align(t, x)) * self.score(x, t)

    def x1(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, "b a"]:
        """E[x1 | x_t = x]."""
        log_joint, _, mean, *_ = self._components(x, t)
        return jnp.einsum("bm,bma->ba", jax.nn.softmax(log_joint), mean)

    def velocity(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, "b a"]:
        """``E[alpha' x1 + sigma' eps | x_t = x] = alpha' E[x1 | x] - sigma sigma' score``."""
        u = align(t, x)
        return self.schedule.d_alpha(u) * self.x1(x, t) - self.schedule.sigma_d_sigma(u) * self.score(x, t)

    def divergence(self, x: Float[Array, "b a"], t: Float[Array, "*b"]) -> Float[Array, " b"]:
        """Divergence of `velocity`, from ``grad r_k = r_k (score_k - score)`` for the responsibilities r."""
        log_joint, score, mean, gain, total = self._components(x, t)
        r = jax.nn.softmax(log_joint)
        pull = score - jnp.einsum("bm,bma->ba", r, score)[:, None]
        div_x1 = jnp.einsum("bm,bma->b", r, gain + pull * mean)
        div_score = jnp.einsum("bm,bma->b", r, -1 / total + pull * score)
        return self.schedule.d_alpha(t) * div_x1 - self.schedule.sigma_d_sigma(t) * div_score
