"""What every action expert has: a configuration, and a module that sees the backbone only through its context.

A new expert is one file with both, and one line in `EXPERTS`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.compute import Compute
from vla_jax.types import Context, Given


class Expert(nn.Module):
    """A chunk's prediction at time t, from the context and what else is given.

    `denoise` is prepared by two methods, of which each may do nothing: what depends on neither the noisy chunk nor t is
    computed once per call, what depends on t alone once per schedule of a solver. Training runs `denoise` without them.
    """

    def prepare(self, context: Context, given: Given) -> tuple[Context, Given]:
        """Moves into the context what all evaluations of a chunk have in common; the prediction stays the same."""
        return context, given

    def condition(self, t: Float[Array, "r"] | Float[Array, "r k"]) -> Any:
        """All that depends on t alone, a tree of arrays with axes of 1 where rows or steps are alike; t itself if
        nothing does."""
        return t

    def denoise(
        self, context: Context, given: Given, x_t: Float[Array, "r k a"], at: Any
    ) -> Float[Array, "r k a"]:
        """The prediction, float32; `at` is what `condition` made.

        The rows of `x_t` and `given` may be K times those of the context: K draws per sample, next to each other.
        `given.action_mask` is False in two kinds of elements. Padded steps (no valid dimension: behind the episode's
        end) are invisible: not read, and attended by nobody. Padded dims of other steps (the robot has fewer than the
        model) are zeros to the network or what `x_t` holds there, as `padding` says.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What every expert's configuration has; `kind` is its name in `EXPERTS`."""

    kind: str = ""
    horizon: int = 8
    """Actions of one chunk."""
    action_dim: int = 0
    """Action dimension; 0: as the data set has."""
    state_dim: int = 0
    """State dimension; 0: as the data set has."""
    padding: Literal["zero", "noise"] = "zero"
    """What the network reads in action dimensions that the model has and the robot has not: zeros, or the noisy chunk
    as in the others, as the public π0's do (there the data are zeros). A network can only be sampled as it was trained,
    so that weights that come in, and all that is trained from them, are `noise`."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Context` that it needs: kv, features."""
    is_network: ClassVar[bool] = True
    """False: there is no expert; the backbone's decoder writes the chunk."""
    sized_by: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(pattern of parameter paths under ``expert/``, field): arrays whose shape follows the data set's dimensions or an
    option, so that a checkpoint of another robot lacks them or has them in another shape."""

    def __post_init__(self):
        if self.padding not in ("zero", "noise"):
            raise ValueError(f"expert.padding={self.padding!r}: use zero or noise")
        if self.horizon < 1:
            raise ValueError(f"expert.horizon={self.horizon}: a chunk needs at least one action")

    @property
    def reads_state(self) -> bool:
        """Whether the network is given the robot's state; where not, only the prompt can tell it."""
        return True

    @property
    def tokens(self) -> int:
        """Tokens that one evaluation runs through the network."""
        return self.horizon

    def unknown(self) -> dict[str, int]:
        """Sizes that may be left to the data set, by option; 0: still unknown."""
        return {"expert.action_dim": self.action_dim, "expert.state_dim": self.state_dim}

    def check(self, compute: Compute) -> None:
        """Raises ValueError where it cannot be computed so."""

    def without_padding(
        self, x_t: Float[Array, "r k a"], action_mask: Bool[Array, "r k a"] | None
    ) -> tuple[Float[Array, "r k a"], Bool[Array, "r k"]]:
        """What the network may read of a noisy chunk, and which steps there are; see `Expert.denoise`."""
        if action_mask is None:
            return x_t, jnp.ones(x_t.shape[:2], bool)
        steps = action_mask.any(axis=-1)
        return jnp.where(action_mask if self.padding == "zero" else steps[..., None], x_t, 0), steps

    def make(self, backbone: BackboneConfig, compute: Compute) -> Expert:
        """The module for contexts of a backbone."""
        raise NotImplementedError


def is_time(at: Any) -> bool:
    """Whether it is t itself and not yet what `Expert.condition` makes of it."""
    return isinstance(at, jax.Array)
