"""The arrays that travel through the library, and the letters of their axes.

Axis letters are the same in jaxtyping, einsum, documentation and plots:

| letter | axis                                | letter | axis                               |
|--------|-------------------------------------|--------|------------------------------------|
| b      | batch                               | d      | width (residual stream)            |
| c      | cameras                             | f      | feed-forward width                 |
| h w    | image height, width                 | n      | query heads                        |
| p      | image patches (tokens of a camera)  | m      | key/value heads                    |
| s      | prefix tokens                       | e      | head dimension                     |
| l      | text tokens                         | v      | vocabulary                         |
| q      | state dimension                     | t      | time, or the queries of attention  |
| k      | action horizon (chunk length)       | a      | action dimension                   |

Padding of chunks is of two kinds, both False in `action_mask`: padded *steps* lie behind the end of an episode and no
network reads them; padded *dims* are those that a model has and the robot has not (`model.expert.padding`).

Time: t = 0 is noise, t = 1 is data. Masks are boolean, True = valid.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.layers.gradient import scale_gradient

PyTree = Any

if TYPE_CHECKING:  # jaxlib comes without declarations of its classes
    Device = Any
else:
    Device = jax.Device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model sees; the same for training and inference.

    Text is laid out as ``[bos prompt separator][target eos][padding]``: `token_causal` is True from the
    first target token on, `token_loss` where the token is to be predicted. History frames are further
    cameras (``wrist@-1``), past states a longer state.

    `action_tokens` is the chunk once more, as FAST tokens: ``[begin][tokens][end][padding]``, with
    `action_token_loss` where a token is to be predicted. They are not part of the prefix: they see what an expert
    would see of it, and no expert sees them.
    """

    images: dict[str, UInt8[Array, "b h w 3"]]
    image_mask: dict[str, Bool[Array, " b"]]
    state: Float[Array, "b q"]
    tokens: Int[Array, "b l"]
    token_mask: Bool[Array, "b l"]
    token_causal: Bool[Array, "b l"]
    token_loss: Bool[Array, "b l"]
    embodiment: Int[Array, " b"] | None = None
    """Which robot: the number of its part of the data."""
    sensors: dict[str, Float[Array, "b n d"]] = dataclasses.field(default_factory=dict)
    """Streams at rates of their own: the last n readings of d values."""
    conditions: dict[str, Float[Array, "b d"]] = dataclasses.field(default_factory=dict)
    """What the chunk is to be like, by name."""
    actions: Float[Array, "b k a"] | None = None
    action_mask: Bool[Array, "b k a"] | None = None
    action_tokens: Int[Array, "b g"] | None = None
    action_token_mask: Bool[Array, "b g"] | None = None
    action_token_loss: Bool[Array, "b g"] | None = None

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class KeysValues(NamedTuple):
    """Keys and values of every layer: stacked along a leading axis of layers, or one array per layer. Within a layer
    its own, `[b s m e]`."""

    keys: Float[Array, "*layers b s m e"] | tuple[Float[Array, "b s m e"], ...]
    values: Float[Array, "*layers b s m e"] | tuple[Float[Array, "b s m e"], ...]

    def of_layer(self) -> tuple[Float[Array, "b s m e"], Float[Array, "b s m e"]]:
        """Both, within a layer. Raises ValueError where they are a tuple of all layers'."""
        if isinstance(self.keys, tuple) or isinstance(self.values, tuple):
            raise ValueError("keys and values of all layers, where those of one are read")
        return self.keys, self.values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a backbone leaves behind: all that experts and text decoding see of images and text.

    All knowledge of its axes lives here. A backbone fills in what its expert reads: `kv`, `features`, or both.
    """

    kv: KeysValues | None = None
    features: Float[Array, "b s d"] | None = None
    """Outputs of the last layer."""
    mask: Bool[Array, "b s"]
    """Which positions hold a token at all."""
    visible: Bool[Array, "b s"]
    """Which of them an expert may see; never more than `mask`."""
    positions: Int[Array, "b s"]

    def replace(self, **changes: Any) -> "Context":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def repeat(self, times: int) -> "Context":
        """Each sample so many times, next to each other."""
        if times == 1:
            return self
        return self._map(lambda x, axis: jnp.repeat(x, times, axis=axis), batch=True)

    def insulated(self, kappa: float | Float[Array, ""]) -> "Context":
        """The same values; what flows back into the backbone is multiplied by κ."""
        seen = jax.tree.map(lambda x: scale_gradient(x, kappa), (self.kv, self.features))
        return self.replace(kv=seen[0], features=seen[1])

    def reserve(self, slots: int) -> "Context":
        """Empty places behind the last position, for tokens that are yet to come (`write`)."""

        def pad(x: Array, axis: int) -> Array:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, slots)
            return jnp.pad(x, widths)

        return self._map(pad, batch=False)

    def append(self, kv: KeysValues, positions: Int[Array, "b t"]) -> "Context":
        """Further tokens behind the last position, which everybody sees."""
        there = jnp.ones(positions.shape, bool)
        return self.replace(
            kv=jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=-3), self.kv, kv),
            mask=jnp.concatenate([self.mask, there], axis=1),
            visible=jnp.concatenate([self.visible, there], axis=1),
            positions=jnp.concatenate([self.positions, positions], axis=1),
        )

    def write(
        self,
        kv: KeysValues,
        features: Float[Array, "b 1 d"],
        positions: Int[Array, "b 1"],
        slot: Int[Array, ""],
        *,
        visible: bool,
    ) -> "Context":
        """One token per sample into place `slot`, which `reserve` has made; features only where there are any."""

        def put(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=axis)

        def mark(mask: Array, value: bool) -> Array:
            return put(mask, jnp.full((mask.shape[0], 1), value), 1)

        return self.replace(
            kv=jax.tree.map(lambda old, new: put(old, new, old.ndim - 3), self.kv, kv),
            features=None if self.features is None else put(self.features, features, 1),
            mask=mark(self.mask, True),
            visible=mark(self.visible, visible),
            positions=put(self.positions, positions, 1),
        )

    def _map(self, change: Callable[[Array, int], Array], *, batch: bool) -> "Context":
        """Applies `change(array, axis)` to everything, with the axis of samples or of positions."""
        kv = jax.tree.map(lambda x: change(x, x.ndim - (4 if batch else 3)), self.kv)
        flat = (self.features, self.mask, self.visible, self.positions)
        features, mask, visible, positions = jax.tree.map(lambda x: change(x, 0 if batch else 1), flat)
        return Context(kv=kv, features=features, mask=mask, visible=visible, positions=positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What an expert may read beside the context; fields as in `Batch`."""

    state: Float[Array, "b q"] | None
    """None where it is in the context already, and its token where `Expert.prepare` has made that."""
    action_mask: Bool[Array, "b k a"] | None = None
    embodiment: Int[Array, " b"] | None = None
    sensors: dict[str, Float[Array, "b n d"]] = dataclasses.field(default_factory=dict)
    conditions: dict[str, Float[Array, "b d"]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> "Given":
        """What a batch has of it."""
        return cls(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(cls)})

    def replace(self, **changes: Any) -> "Given":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def repeat(self, times: int) -> "Given":
        """Each sample so many times, next to each other."""
        return self if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a batch of robots sees, on the host, in the robots' own units: the input of a policy.

    `data.observations.check_observation` says what is taken.
    """

    images: dict[str, UInt8[np.ndarray, "b h w 3"] | None]
    """Camera → RGB images of any size; None: the robots have no such camera now (the model sees a masked image)."""
    state: Float[np.ndarray, "b q"]
    instruction: tuple[str, ...]
