"""The one program: uint8 images, raw state and prompt to actions in the robot's units."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.flow.base import normal
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Process
from vla_jax.serve.compiled import solve
from vla_jax.serve.compiled.network import Network, Prefix
from vla_jax.serve.compiled.preprocess import (
    Scaling,
    model_actions,
    normalize_state,
    resize_with_pad,
    robot_actions,
)
from vla_jax.serve.sampling import Continuation, Overlap
from vla_jax.types import PyTree


class Shape(NamedTuple):
    """All that makes one executable differ from another of the same policy."""

    rows: int
    """Observations."""
    cameras: tuple[tuple[str, int, int], ...]
    """Name, height and width of each, as the robot sends them."""
    length: int
    """Text tokens."""
    samples: int
    sees: bool
    """The text holds a plan that the actions see."""
    solver: SolverConfig
    guided: bool = False
    """Instructions have weights other than 1: the texts are followed by as many null prompts."""
    again: bool = False
    """From the prefix that an earlier call left: no images, no text."""
    keep: bool = False
    """Return that prefix."""
    continues: Continuation | None = None
    """The chunks continue those that run, and how."""


class Text(NamedTuple):
    """A batch of prompts; embedded ones where embeddings are kept on the device, else token ids."""

    tokens: Int[Array, "b l"] | Float[Array, "b l d"]
    mask: Bool[Array, "b l"]
    causal: Bool[Array, "b l"] | None


class Inputs(NamedTuple):
    """What changes from call to call."""

    images: tuple[UInt8[Array, "b h w 3"], ...]
    present: Bool[Array, " c"]
    text: Text | None
    state: Float[Array, "b q"]
    group: Int[Array, " b"]
    """Of the statistics."""
    key: Array
    """Key data [b …] as `jax.random.key_data` gives them."""
    number: Int[Array, " b"]
    """Folded into each row's noise: the row among those that share a key, 0 where it has its own (`serve.noise`)."""
    guidance: Float[Array, " b"] | None
    """Weights of the instructions."""
    overlap: Overlap | None
    """What is known of the chunks that run, in the robots' units and dimensions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The function and its parts, each of which can be compiled (and timed) by itself."""

    network: Network
    process: Process
    scaling: Scaling

    def act(
        self, weights: PyTree, conditions: Any, inputs: Inputs, prefix: Prefix | None, shape: Shape
    ) -> Any:
        """Actions [b S k a], and the prefix where it is to be kept."""
        if not shape.again:
            tokens = self.vision(weights, inputs, shape)
            prefix = self.prefill(weights, tokens, inputs)
        actions = self.denoise(weights, conditions, prefix, inputs, shape)
        return (actions, prefix) if shape.keep else actions

    def vision(self, weights: PyTree, inputs: Inputs, shape: Shape) -> Float[Array, "b c p d"]:
        """Image tokens: all cameras go through the encoder as one batch."""
        # Cameras beside each other, not one after another: a batch that is split over devices stays where it is.
        images = jnp.stack([resize_with_pad(image, self.scaling.resize) for image in inputs.images], axis=1)
        encoded = self.network.encode(weights["vision"], images.reshape(-1, *images.shape[2:]))
        return encoded.reshape(*images.shape[:2], *encoded.shape[1:])

    def prefill(self, weights: PyTree, image_tokens: Float[Array, "b c p d"], inputs: Inputs) -> Prefix:
        """What images and text leave for the expert."""
        text = inputs.text
        copies = (
            text.mask.shape[0] // image_tokens.shape[0]
        )  # 2 with null prompts: the images are encoded once
        image_tokens = jnp.tile(image_tokens, (copies, 1, 1, 1))
        if self.network.rewrites.embeddings:
            embedded = text.tokens
        else:
            embedded = self.network.embed(weights["text"]["embedding"], text.tokens)
        return self.network.prefill(
            weights["text"], image_tokens, inputs.present, embedded, text.mask, text.causal
        )

    def denoise(
        self, weights: PyTree, conditions: Any, prefix: Prefix, inputs: Inputs, shape: Shape
    ) -> Float[Array, "b S k a"]:
        """Noise to actions in the robot's units."""
        expert, state = weights["expert"], None
        if self.network.model.expert.state_token:
            state = normalize_state(self.scaling.state, inputs.group, inputs.state)
            state = jnp.tile(state, (1 + shape.guided, 1))
            if self.network.rewrites.state:
                prefix, state = self.network.add_state(expert, prefix, state), None
        if shape.continues is not None:
            inputs = inputs._replace(overlap=self._known(inputs, shape))
        chunks = self._sample(expert, conditions, prefix, state, inputs, shape)
        return robot_actions(self.scaling.action, inputs.group, chunks)

    def _known(self, inputs: Inputs, shape: Shape) -> Overlap:
        """The running chunks in the model's units and dimensions, one for each sample."""
        known = model_actions(self.scaling.known, inputs.group, inputs.overlap.known)
        missing = self.network.model.expert.action_dim - known.shape[-1]
        known = jnp.pad(known, ((0, 0), (0, 0), (0, missing)))
        return dataclasses.replace(inputs.overlap, known=known).repeated(shape.samples)

    def _sample(self, expert: PyTree, conditions: Any, prefix: Prefix, state, inputs: Inputs, shape: Shape):
        config = self.network.model.expert
        chunk = (config.horizon, config.action_dim)
        keys = jax.vmap(_noise_key)(inputs.key, inputs.number)
        noise = normal(keys, (shape.rows * shape.samples, *chunk))
        guidance = None if inputs.guidance is None else jnp.repeat(inputs.guidance, shape.samples)
        run = solve.Run(self.network, expert, prefix, state, conditions, guidance)
        if inputs.overlap is None:
            chunks = solve.sample(run, noise, keys, self.process, shape.solver)
        else:
            real = jnp.arange(config.action_dim) < self.scaling.action.factor.shape[-1]
            chunks = solve.sample_on(run, noise, keys, self.process, shape.solver, inputs.overlap, real)
        return chunks.reshape(shape.rows, shape.samples, *chunk)


def _noise_key(data: Array, number: Int[Array, ""]) -> Array:
    """A row's key, derived as by `serve.noise.draws`."""
    _, for_actions = jax.random.split(jax.random.wrap_key_data(data))
    return jax.random.fold_in(for_actions, number)
