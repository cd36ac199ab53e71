"""λ is a function of the step.

π0.5 (arXiv:2504.16054, section IV-D) pre-trains with λ = 0 and post-trains with λ = 10: a step.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.objectives.weighting.base import Gram, Remembered, Scalar, Weighting, Weights

SHAPES = {
    "linear": lambda u: u,
    "cosine": lambda u: (1 - jnp.cos(jnp.pi * u)) / 2,
}
"""f(u) with f(0) = 0 and f(1) = 1; a step needs none."""


@dataclasses.dataclass(frozen=True)
class Scheduled(Weighting):
    """λ_i(step) = start + (λ_i - start) · f(u), u = clip((step - begin) / (end - begin), 0, 1), for all but the text.

    `begin` and `end` are steps, counted from 0; "step" has λ from step `begin` on and no end.
    """

    start: float
    shape: str
    begin: int
    end: int

    @property
    def can_be_zero(self) -> bool:
        """Before `begin`, where it starts from 0."""
        return self.start == 0

    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram | None) -> Weights:
        """1 for the text, λ(step) for the others."""
        return self.everywhere(lambda name: 1.0 if name == "text" else self.at(step, self.lambdas[name]))

    def at(self, step: Int[Array, ""] | int, given: float | Scalar) -> Float[Array, ""]:
        """λ at a step on its way from `start` to the given one."""
        progress = self._progress(step)
        if self.shape == "step":
            return jnp.where(progress > 0, given, self.start).astype(jnp.float32)
        return self.start + (given - self.start) * progress

    def is_zero(self, step: Int[Array, ""] | int) -> Bool[Array, ""]:
        """Whether λ of a step is 0. It does not depend on the given λ: where models of several λ are trained in one
        program they agree on it."""
        return (self._progress(step) == 0) & (self.start == 0)

    def _progress(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """f(u), from 0 at `start` to 1 at λ."""
        since = jnp.asarray(step, jnp.float32) - self.begin
        if self.shape == "step":
            return (since >= 0).astype(jnp.float32)
        return SHAPES[self.shape](jnp.clip(since / max(self.end - self.begin, 1), 0, 1))
