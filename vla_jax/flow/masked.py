"""A discrete process for tokens: masked diffusion (Shi et al. 2406.04329; Gat et al. 2407.15595, mixture path).

A token is itself with probability kappa(t) = t and a mask otherwise; the field sees the rest and predicts every
token. The weighted cross-entropy is a bound on -log p(x), tight for a perfect field.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.flow.paths import align

TokenField = Callable[[Int[Array, "b *n"], Float[Array, " b"]], Float[Array, "b *n v"]]


class Masked(NamedTuple):
    """Training examples: tokens with masks in them, their times, the whole tokens, and where the masks are."""

    x_t: Int[Array, "b *n"]
    t: Float[Array, " b"]
    target: Int[Array, "b *n"]
    masked: Bool[Array, "b *n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedProcess:
    """Tokens 0 ... vocabulary - 1, and the mask, which is token `vocabulary`."""

    vocabulary: int

    def corrupt(
        self, key: Key[Array, ""], tokens: Int[Array, "b *n"], *, t: Float[Array, " b"] | None = None
    ) -> Masked:
        """Each token masked with probability 1 - t; t uniform unless given."""
        for_mask, for_time = jax.random.split(key)
        if t is None:
            t = jax.random.uniform(for_time, tokens.shape[:1])
        masked = jax.random.uniform(for_mask, tokens.shape, t.dtype) >= align(t, tokens)
        return Masked(jnp.where(masked, self.vocabulary, tokens), t, tokens, masked)

    def loss(self, logits: Float[Array, "b *n v"], example: Masked) -> Float[Array, "b *n"]:
        """``kappa' / (1 - kappa) (-log p(token))`` where masked, 0 elsewhere; its sum over tokens bounds -log p(x)."""
        log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        nll = -jnp.take_along_axis(log_p, example.target[..., None], axis=-1)[..., 0]
        # Nothing is masked at t = 1, where the weight is infinite.
        weight = 1 / jnp.where(example.t < 1, 1 - example.t, 1)
        return jnp.where(example.masked, align(weight, nll) * nll, 0)

    def sample(
        self, field: TokenField, key: Key[Array, ""], shape: tuple[int, ...], num_steps: int
    ) -> Int[Array, "b *n"]:
        """From all masks; a step from t to s unmasks each with probability (s - t) / (1 - t). num_steps evaluations.

        Tokens unmasked in the same step are drawn independently of each other: exact as num_steps grows.
        """
        times = jnp.arange(num_steps) / num_steps

        def step(x, inputs):
            t, key = inputs
            for_token, for_choice = jax.random.split(key)
            token = jax.random.categorical(for_token, field(x, jnp.full(shape[:1], t)))
            chosen = jax.random.uniform(for_choice, shape) * (1 - t) < 1 / num_steps
            # The last step takes all that is left, whatever rounding did to 1 - t.
            chosen |= t == times[-1]
            return jnp.where((x == self.vocabulary) & chosen, token.astype(x.dtype), x), None

        start = jnp.full(shape, self.vocabulary, jnp.int32)
        return jax.lax.scan(step, start, (times, jax.random.split(key, num_steps)))[0]
