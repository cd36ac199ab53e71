"""What a λ policy is: a weight for every loss per step, a function of step, losses, gradients and its own state.

Every known balancing rule gives a linear combination of the losses' gradients, and what it knows of the gradients are
their inner products on the shared trunk: the Gram matrix, n × n for n losses. So a policy is three pure functions of
scalars,

    state   = policy.init()
    weights = policy.weights(step, state, gram)          # what multiplies the gradients of this step
    state   = policy.update(state, losses, gram)         # what is remembered for the next

and one that does not ask for `gram` costs nothing: its weights are known before the backward pass.
"""

import abc
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.types import PyTree

Scalar = Float[Array, ""]
Named = dict[str, Scalar]
"""One value for each loss, by the name of its term. Look them up by name: what has passed through a transformation of
JAX is sorted."""
Remembered = Any
"""A tree of float32 scalars, or None; it is checkpointed with the training state."""
Gram = Float[Array, "n n"]
"""g_i · g_j on the shared trunk, in the order of `Weighting.lambdas`; ‖g_i‖² on its diagonal."""


class Weights(NamedTuple):
    """What multiplies the gradients, on the shared trunk and on all other parameters."""

    trunk: Named
    rest: Named


@dataclasses.dataclass(frozen=True)
class Weighting(abc.ABC):
    """A λ policy: its constants. This base remembers nothing."""

    lambdas: Mapping[str, float | Scalar]
    """λ of each term as the configuration gives it, above 0; traced where models of several λ are trained together."""

    uses_gradients: ClassVar[bool] = False
    """Whether it needs `gram`, and with it the gradient of each loss (a backward pass for each)."""

    @property
    def can_be_zero(self) -> bool:
        """Whether the weights of all but the text may be exactly 0 for some steps; then only the text is computed in
        them, and `is_zero(step)` says which they are."""
        return False

    def is_zero(self, step: Int[Array, ""] | int) -> Bool[Array, ""]:
        """Whether this step is one of them."""
        return jnp.zeros((), bool)

    def init(self) -> Remembered:
        """The state before the first step."""
        return None

    @abc.abstractmethod
    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram | None) -> Weights:
        """The weights of this step; `gram` is None unless `uses_gradients`."""

    def update(self, state: Remembered, losses: Named, gram: Gram | None) -> Remembered:
        """The next state, from the unweighted losses of this step. A loss of exactly 0 was not in the batch."""
        return state

    def by_name(self, value: Callable[[str], Any]) -> Named:
        """A value for each loss, in the order of the terms. A plain dict would be sorted by JAX, and checksums of old
        checkpoints depend on the order of what a policy remembers."""
        return OrderedDict((name, jnp.asarray(value(name), jnp.float32)) for name in self.lambdas)

    def scaled(self, gram: Gram) -> Gram:
        """The inner products of the gradients of λ_i L_i."""
        given = self.vector()
        return given[:, None] * given * gram

    def vector(self) -> Float[Array, " n"]:
        """λ in the order of the terms."""
        return jnp.stack([jnp.asarray(weight, jnp.float32) for weight in self.lambdas.values()])

    def everywhere(self, value: Callable[[str], Any]) -> Weights:
        """The same weights on all parameters: those of a weighted sum of losses."""
        found = self.by_name(value)
        return Weights(found, found)

    def on_trunk(self, factors: Float[Array, " n"]) -> Weights:
        """factor · λ on the trunk; λ elsewhere, where each parameter has its own loss's gradient."""
        trunk = dict(zip(self.lambdas, self.vector() * factors))
        return Weights(trunk, self.by_name(lambda name: self.lambdas[name]))


def dot(a: Float[Array, "*m n"], b: Float[Array, " n"]) -> Float[Array, "*m"]:
    """Σ a b over the last axis. A matrix product would be rounded to bfloat16 on a TPU, and to TF32 on a GPU."""
    return jnp.sum(a * b, axis=-1)


def ratio(over: Scalar, under: Scalar, otherwise: Scalar | float) -> Scalar:
    """over / under where both are above 0, else `otherwise`."""
    valid = (over > 0) & (under > 0)
    return jnp.where(valid, over / jnp.where(valid, under, 1), otherwise)


def zero() -> Scalar:
    """A scalar of a new state."""
    return jnp.zeros((), jnp.float32)


def combine(weights: Weights, gradients: Mapping[str, PyTree], inside: PyTree) -> PyTree:
    """Σ w_i · g_i; `inside` is a tree of bools, True on the shared trunk."""

    def leaf(in_trunk: bool, *parts: Array) -> Array:
        w = weights.trunk if in_trunk else weights.rest
        terms = [w[name] * part for name, part in zip(gradients, parts, strict=True)]
        return sum(terms[1:], terms[0])

    return jax.tree.map(leaf, inside, *gradients.values())
