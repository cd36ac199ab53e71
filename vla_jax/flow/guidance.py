"""Guidance: fields made of fields. Each function returns ``field(x, t)``, to be sampled like any other.

Scale w: 0 is unconditional, 1 conditional, above 1 guided. (Meta's examples and others write s = w - 1.) The rules
are affine with weights that sum to one, so that guiding velocity, eps, x1 or score is the same thing.

What guidance does *not* do: the guided ODE does not sample ``p(x) p(c|x)^w``. On Gaussians (prior std 1, conditional
0.5, w = 3) it ends at std 0.125 where the tilted law has 0.316 (Bradley & Nakkiran 2408.09000; docs/flow.md).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.flow.paths import AffinePath, align
from vla_jax.flow.predictions import Kind
from vla_jax.flow.schedules import Schedule
from vla_jax.flow.solvers import Field

ConditionalField = Callable[[Array, Array, Any], Array]


def drop_condition(key: Key[Array, ""], condition: Any, null: Any, rate: float) -> Any:
    """`condition`, with each *sample* replaced by `null` with probability `rate` (Ho & Salimans 2207.12598, alg. 1).

    Both are pytrees of arrays [b ...]; null broadcasts against condition.
    """
    b = jax.tree.leaves(condition)[0].shape[0]
    drop = jax.random.bernoulli(key, rate, (b,))
    return jax.tree.map(lambda c, n: jnp.where(align(drop, c), n, c), condition, null)


def classifier_free(
    field: ConditionalField,
    condition: Any,
    null: Any,
    w: float | Float[Array, ""] | Float[Array, " b"],
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    zero_star: bool = False,
) -> Field:
    """``f_u + w (f_c - f_u)`` of ``field(x, t, condition)`` (2207.12598, eq. 6), as one batch twice as long.

    A Python number w = 1 or 0 costs a single evaluation; a traced w may change without compiling again.
    interval: only for t inside it, conditional elsewhere (Kynkaanniemi et al. 2404.07724); steps with no sample
    inside are evaluated once. zero_star: f_u is first scaled by its projection on f_c (CFG-Zero*, 2503.18886).
    """
    if isinstance(w, int | float):
        if w == 1:
            return lambda x, t: field(x, t, condition)
        if w == 0 and interval == (0.0, 1.0) and not zero_star:
            return lambda x, t: field(x, t, null)

    def conditional(x, t):
        return field(x, t, condition)

    def guided(x, t):
        def twice(u):
            return jnp.concatenate([u, u])

        both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), condition, null)
        f_c, f_u = jnp.split(field(twice(x), twice(t), both), 2)
        if zero_star:
            f_u = _projection(f_c, f_u) * f_u
        scale = jnp.where((interval[0] <= t) & (t <= interval[1]), w, 1.0)
        return mix(f_c, f_u, align(scale, x))

    if interval == (0.0, 1.0):
        return guided

    def within(x, t):
        inside = jnp.any((interval[0] <= t) & (t <= interval[1]))
        return jax.lax.cond(inside, guided, conditional, x, t)

    return within


def mix(f_c: Array, f_u: Array, w: Array | float) -> Array:
    """``f_u + w (f_c - f_u)`` (2207.12598, eq. 6), written so that w = 1 is exactly f_c; w = 0 is exactly f_u too."""
    return jnp.where(w == 0, f_u, f_c + (w - 1) * (f_c - f_u)).astype(f_c.dtype)


def _projection(f_c: Array, f_u: Array) -> Array:
    """``<f_c, f_u> / |f_u|^2`` of each sample; 0 where f_u is 0."""
    axes = tuple(range(1, f_c.ndim))
    dot = jnp.sum(f_c * f_u, axes, keepdims=True)
    norm = jnp.sum(f_u * f_u, axes, keepdims=True)
    return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1), 0)


def autoguidance(good: Field, bad: Field, w: float | Float[Array, ""]) -> Field:
    """``bad + w (good - bad)``: away from a weaker model of the same thing (Karras et al. 2406.02507, eq. 3)."""
    if isinstance(w, int | float) and w == 1:
        return good

    def guided(x, t):
        worse = bad(x, t)
        return worse + w * (good(x, t) - worse)

    return guided


def classifier(
    field: Field,
    log_prob: Callable[[Array, Array], Array],
    w: float | Float[Array, ""],
    *,
    schedule: Schedule,
    prediction: Kind = "velocity",
) -> Field:
    """The field of ``score + w grad log p(c | x_t)`` (Dhariwal & Nichol 2105.05233), for any kind of prediction.

    ``log_prob(x, t) -> [b]``. At t = 0 on a path of pure noise x holds nothing for a classifier to see, and the
    term is left out: there, for x1 and velocity, its factor is infinite and its gradient zero.
    """

    def factor(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if prediction == "score":
            return jnp.ones_like(t)
        if prediction == "eps":
            return -sigma
        seen = alpha > 0
        safe = jnp.where(seen, alpha, 1)
        if prediction == "x1":
            value = sigma**2 / safe
        elif prediction == "v":
            value = -sigma * (alpha**2 + sigma**2) / safe
        else:
            value = sigma**2 * schedule.d_alpha(t) / safe - schedule.sigma_d_sigma(t)
        return jnp.where(seen, value, 0)

    def guided(x, t):
        gradient = jax.grad(lambda x: log_prob(x, t).sum())(x)
        return field(x, t) + w * align(factor(t), x) * gradient

    return guided


def inpaint(
    field: Field,
    known: Float[Array, "b ..."],
    mask: Bool[Array, "b ..."],
    noise: Float[Array, "b ..."],
    schedule: Schedule,
) -> Field:
    """A velocity field in which the entries under `mask` walk from `noise` to `known` (replacement).

    Start the solver from the same `noise`. On CondOT every solver ends exactly at `known`.
    """
    path = AffinePath(schedule)

    def guided(x, t):
        point = path.sample(noise, known, t)
        return jnp.where(mask, point.dx_t, field(jnp.where(mask, point.x_t, x), t))

    return guided


def soft_inpaint(
    field: Field,
    known: Float[Array, "b ..."],
    weight: Float[Array, "b ..."],
    *,
    bound: float | Float[Array, ""] = 5.0,
    jacobian: bool = True,
) -> Field:
    """Real-time chunking's guidance of a CondOT velocity towards `known` (Black et al. 2506.07339, eq. 2-4).

    ``v + min(bound, (1-t) / (t r^2)) J^T W (known - x1(x))`` with ``x1 = x + (1-t) v``, J its Jacobian and
    ``r^2 = (1-t)^2 / (t^2 + (1-t)^2)``: entries of weight 1 are held, of weight 0 free, others pulled. Costs one
    vector-Jacobian product of the field an evaluation; with jacobian=False J is taken for the identity, which costs
    nothing and is another rule (it is what LeRobot's code computes). All weights 0: the plain field.
    """

    def guided(x, t):
        def data(x):
            v = field(x, t)
            return x + align(1 - t, x) * v, v

        if jacobian:
            x1, pull, v = jax.vjp(data, x, has_aux=True)
            (correction,) = pull((weight * (known - x1)).astype(x1.dtype))
        else:
            x1, v = data(x)
            correction = (weight * (known - x1)).astype(x1.dtype)
        # (1-t) / (t r^2) with r^2 written out: infinite, never 0/0, at both ends.
        strength = jnp.minimum(bound, (t**2 + (1 - t) ** 2) / (t * (1 - t)))
        return v + align(strength, x) * correction

    return guided


def soft_weights(horizon: int, delay: int | Int[Array, ""], end: int | Int[Array, ""]) -> Float[Array, " k"]:
    """W of real-time chunking for a chunk of k steps (2506.07339, eq. 5): 1, then falling, then 0.

    The first `delay` steps run before the chunk is there: 1. From `end` on nothing is known: 0. Between them
    ``c (e^c - 1) / (e - 1)`` with ``c = (end - i) / (end - delay + 1)``.
    """
    i = jnp.arange(horizon)
    c = jnp.clip((end - i) / (end - delay + 1), 0, 1)
    falling = c * jnp.expm1(c) / jnp.expm1(1.0)
    return jnp.where(i < end, jnp.where(i < delay, 1.0, falling), 0.0)


def clean_prefix(field: Field, known: Float[Array, "b k a"], held: Bool[Array, "b k #a"]) -> Field:
    """A velocity field that keeps the steps `held` at `known`, and shows them to `field` as data: clean, at t = 1.

    For fields trained so (training-time real-time chunking, 2512.05964). `field` takes times [b k]. Start the solver
    from ``where(held, known, noise)``; it ends there exactly.
    """

    def clamped(x, t):
        clean = held.any(axis=-1)
        v = field(jnp.where(held, known, x), jnp.where(clean, 1, align(t, clean)))
        return jnp.where(held, 0, v)

    return clamped
