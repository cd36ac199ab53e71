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
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

PyTree = Any


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
    actions: Float[Array, "b k a"] | None = None
    action_mask: Bool[Array, "b k a"] | None = None
    action_tokens: Int[Array, "b g"] | None = None
    action_token_mask: Bool[Array, "b g"] | None = None
    action_token_loss: Bool[Array, "b g"] | None = None

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What the backbone leaves behind for experts and text decoding. Layers lead, because they are scanned.

    `mask` says which positions hold a token at all, `visible` which of them an expert may see (never more
    than `mask`); `features` is the last layer's output where an expert asks for it.
    """

    keys: Float[Array, "layers b s m e"]
    values: Float[Array, "layers b s m e"]
    mask: Bool[Array, "b s"]
    visible: Bool[Array, "b s"]
    positions: Int[Array, "b s"]
    features: Float[Array, "b s d"] | None = None

    def replace(self, **changes: Any) -> "Cache":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a batch of robots sees, on the host, in the robots' own units: the input of a policy.

    `data.observations.check_observation` says what is taken.
    """

    images: dict[str, UInt8[np.ndarray, "b h w 3"] | None]
    """Camera → RGB images of any size; None: the robots have no such camera now (the model sees a masked image)."""
    state: Float[np.ndarray, "b q"]
    instruction: tuple[str, ...]
