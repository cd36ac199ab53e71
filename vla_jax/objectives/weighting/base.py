"""What a λ policy is: two weights per step, a function of step, losses, gradients and its own state.

With two losses every known balancing rule gives a linear combination of their gradients, and what it knows of the
gradients are their three inner products on the shared trunk. So a policy is three pure functions of scalars,

    state   = policy.init()
    weights = policy.weights(step, state, products)          # what multiplies the gradients of this step
    state   = policy.update(state, losses, products)         # what is remembered for the next

and one that does not ask for `products` costs nothing: its weights are known before the backward pass.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = Float[Array, ""]
State = Any
"""A tree of float32 scalars, or None; it is checkpointed with the training state."""


class Pair(NamedTuple):
    """One value for each loss."""

    text: Any
    action: Any


class Products(NamedTuple):
    """Inner products of the two losses' gradients on the shared trunk."""

    text: Scalar
    """‖g_text‖²"""
    action: Scalar
    """‖g_action‖²"""
    both: Scalar
    """g_text · g_action"""


class Weights(NamedTuple):
    """What multiplies the two gradients, on the shared trunk and on all other parameters."""

    trunk: Pair
    rest: Pair


class Weighting(Protocol):
    """A λ policy: a frozen dataclass of its constants. `weight` is objective.action_weight, above 0."""

    uses_gradients: ClassVar[bool]
    """Whether it needs `products`, and with them the gradient of each loss (a second backward pass)."""

    @property
    def can_be_zero(self) -> bool:
        """Whether the action weight may be exactly 0 for some steps; the expert is then not run in them, and
        `is_zero(step)` says which they are."""

    def init(self) -> State:
        """The state before the first step."""

    def weights(self, step: Int[Array, ""], state: State, products: Products | None) -> Weights:
        """The weights of this step; `products` is None unless `uses_gradients`."""

    def update(self, state: State, losses: Pair, products: Products | None) -> State:
        """The next state, from the unweighted losses of this step. A loss of exactly 0 was not in the batch."""


class Stateless:
    """The part of a policy that remembers nothing."""

    def init(self) -> State:
        """None."""
        return None

    def update(self, state: State, losses: Pair, products: Products | None) -> State:
        """None."""
        return None


def everywhere(text: Any, action: Any) -> Weights:
    """The same weights on all parameters: those of a weighted sum of losses."""
    pair = Pair(jnp.asarray(text, jnp.float32), jnp.asarray(action, jnp.float32))
    return Weights(pair, pair)


def ratio(over: Scalar, under: Scalar, otherwise: Scalar | float) -> Scalar:
    """over / under where both are above 0, else `otherwise`."""
    valid = (over > 0) & (under > 0)
    return jnp.where(valid, over / jnp.where(valid, under, 1), otherwise)


def zeros(n: int) -> tuple[Scalar, ...]:
    """Scalars of a new state."""
    return tuple(jnp.zeros((), jnp.float32) for _ in range(n))


def combine(weights: Weights, gradients: Pair, inside: Any) -> Any:
    """w_text · g_text + w_action · g_action; `inside` is a tree of bools, True on the shared trunk."""

    def leaf(in_trunk: bool, text: Array, action: Array) -> Array:
        w = weights.trunk if in_trunk else weights.rest
        return w.text * text + w.action * action

    return jax.tree.map(leaf, inside, gradients.text, gradients.action)
