"""λ is a function of the step.

π0.5 (arXiv:2504.16054, section IV-D) pre-trains with λ = 0 and post-trains with λ = 10: a step.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.objectives.weighting.base import Stateless, Weights, everywhere

SHAPES = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - jnp.cos(jnp.pi * u)) / 2,
}
"""f(u) with f(0) = 0 and f(1) = 1; a step needs none."""


@dataclasses.dataclass(frozen=True)
class Scheduled(Stateless):
    """λ(i) = start + (λ - start) · f(u), u = clip((i - begin) / (end - begin), 0, 1), with i counted from 0.

    `begin` and `end` are steps; "step" has λ from step `begin` on and no end.
    """

    weight: float
    start: float
    shape: str
    begin: int
    end: int
    uses_gradients: ClassVar[bool] = False

    @property
    def can_be_zero(self) -> bool:
        """Before `begin`, where it starts from 0."""
        return self.start == 0

    def weights(self, step, state, products) -> Weights:
        """(1, λ(step))."""
        return everywhere(1.0, self.at(step))

    def at(self, step) -> Float[Array, ""]:
        """λ of a step."""
        progress = self._progress(step)
        if self.shape == "step":
            return jnp.where(progress > 0, self.weight, self.start).astype(jnp.float32)
        return self.start + (self.weight - self.start) * progress

    def is_zero(self, step) -> Bool[Array, ""]:
        """Whether λ of a step is 0. It does not depend on `weight`: where models of several weights are trained in
        one program they agree on it."""
        return (self._progress(step) == 0) & (self.start == 0)

    def _progress(self, step) -> Float[Array, ""]:
        """f(u), from 0 at `start` to 1 at λ."""
        since = jnp.asarray(step, jnp.float32) - self.begin
        if self.shape == "step":
            return (since >= 0).astype(jnp.float32)
        return SHAPES[self.shape](jnp.clip(since / max(self.end - self.begin, 1), 0, 1))
