"""The one program: uint8 images, raw state and prompt to actions in the robot's units, through the one network."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Process
from vla_jax.models.config import VLAConfig
from vla_jax.models.vla import VLA
from vla_jax.serve.compiled.config import Rewrites
from vla_jax.serve.compiled.preprocess import (
    Scaling,
    model_actions,
    normalize_state,
    resize_with_pad,
    robot_actions,
)
from vla_jax.serve.sampling import Continuation, Overlap, Sampling, sample_chunks
from vla_jax.serve.schedule import ConditionTable
from vla_jax.types import Batch, Context, Given, PyTree


class Shape(NamedTuple):
    """All that makes one executable differ from another of the same policy."""

    rows: int
    """Observations in a call (axis b)."""
    cameras: tuple[tuple[str, int, int], ...]
    """Name, height and width of each, as the robot sends them."""
    length: int
    """Text tokens of a row, padding included (axis l)."""
    samples: int
    plan_visible: bool
    """The text holds a plan that the actions see."""
    solver: SolverConfig
    guided: bool = False
    """Instructions have weights other than 1: the texts are followed by as many null prompts."""
    again: bool = False
    """From the context that an earlier call left: no images, no text."""
    keep: bool = False
    """Return the context beside the actions, for a later call with `again`."""
    continues: Continuation | None = None
    """The chunks continue those that run, and how."""


class Text(NamedTuple):
    """Prompts as token ids, padded to one length, with a plan behind each where there are plans."""

    tokens: Int[Array, "b l"]
    mask: Bool[Array, "b l"]
    causal: Bool[Array, "b l"] | None
    """None: there are no plans."""


class Inputs(NamedTuple):
    """What changes from call to call."""

    images: tuple[UInt8[Array, "b h w 3"], ...]
    present: Bool[Array, " c"]
    text: Text | None
    state: Float[Array, "b q"]
    group: Int[Array, " b"]
    """Which row of the normalisation's statistics holds for each observation."""
    key: Array
    """Key data [b …] as `jax.random.key_data` gives them."""
    number: Int[Array, " b"]
    """Folded into each row's noise: the row among those that share a key, 0 where it has its own (`serve.noise`)."""
    guidance: Float[Array, " b"] | None
    """Weights of the instructions."""
    overlap: Overlap | None
    """What is known of the chunks that run, in the robots' units and dimensions."""

    @property
    def given_text(self) -> Text:
        """The text, for programs that read it. Raises ValueError where there is none."""
        if self.text is None:
            raise ValueError(
                "images and text are to be read, but these are the inputs of a context that is kept"
            )
        return self.text


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyProgram:
    """The function and its parts, each of which can be compiled (and timed) by itself."""

    config: VLAConfig
    process: Process
    scaling: Scaling
    rewrites: Rewrites

    def model(self, cameras: tuple[str, ...] | None = None) -> VLA:
        """The network, for some of its cameras: none has parameters of its own."""
        return VLA(self.config if not cameras else dataclasses.replace(self.config, cameras=cameras))

    def act(
        self,
        params: PyTree,
        schedule: ConditionTable | None,
        inputs: Inputs,
        context: Context | None,
        shape: Shape,
    ) -> Any:
        """Actions [b S k a], and the context where it is to be kept."""
        if context is None:
            context = self.prefill(params, inputs, shape)
        actions = self.denoise(params, schedule, context, inputs, shape)
        return (actions, context) if shape.keep else actions

    def prefill(self, params: PyTree, inputs: Inputs, shape: Shape) -> Context:
        """What images and text leave for the expert."""
        batch, names = self.batch(inputs, shape), tuple(name for name, _, _ in shape.cameras)
        visible = None if inputs.given_text.causal is None else jnp.ones(batch.tokens.shape[0], bool)
        return self.model(names).apply({"params": params}, batch, visible, method="prefill")[0]

    def encode_images(self, params: PyTree, inputs: Inputs, shape: Shape) -> Float[Array, "b p d"]:
        """The first part of `prefill`."""
        names = tuple(name for name, _, _ in shape.cameras)
        found: Any = self.model(names).apply(
            {"params": params}, self.batch(inputs, shape), method="encode_images"
        )
        return found

    def batch(self, inputs: Inputs, shape: Shape) -> Batch:
        """Images in the model's size, and texts; those of null prompts come behind the others."""
        names, text = [name for name, _, _ in shape.cameras], inputs.given_text
        nothing = jnp.zeros_like(text.mask)
        return Batch(
            images={
                name: resize_with_pad(image, self.scaling.resize) for name, image in zip(names, inputs.images)
            },
            image_mask={
                name: jnp.broadcast_to(inputs.present[i], (shape.rows,)) for i, name in enumerate(names)
            },
            state=self.state(inputs),
            tokens=text.tokens,
            token_mask=text.mask,
            token_causal=nothing if text.causal is None else text.causal,
            token_loss=nothing,
        )

    def state(self, inputs: Inputs) -> Float[Array, "b q"]:
        """Normalised, with zeros in the dimensions that the robot has not."""
        state = normalize_state(self.scaling.state, inputs.group, inputs.state)
        return jnp.pad(state, ((0, 0), (0, self.config.expert.state_dim - state.shape[-1])))

    def denoise(
        self, params: PyTree, schedule: ConditionTable | None, context: Context, inputs: Inputs, shape: Shape
    ) -> Float[Array, "b S k a"]:
        """Noise to actions in the robot's units."""
        expert, dims = self.config.expert, self.scaling.action.factor.shape[-1]
        mask = None
        if dims < expert.action_dim:
            real = jnp.arange(expert.action_dim) < dims
            mask = jnp.broadcast_to(real, (shape.rows, expert.horizon, expert.action_dim))
        overlap = inputs.overlap
        if overlap is not None:
            known = model_actions(self.scaling.known, inputs.group, overlap.known)
            known = jnp.pad(known, ((0, 0), (0, 0), (0, expert.action_dim - dims)))
            overlap = dataclasses.replace(overlap, known=known)
        chunks = sample_chunks(
            Sampling(self.model(), self.process, shape.solver, shape.samples, self.rewrites.state),
            params,
            context,
            Given(state=self.state(inputs), action_mask=mask),
            jax.vmap(_noise_key)(inputs.key, inputs.number),
            schedule=schedule,
            guidance=inputs.guidance,
            overlap=overlap,
        )
        return robot_actions(self.scaling.action, inputs.group, chunks)


def _noise_key(data: Array, number: Int[Array, ""]) -> Array:
    """A row's key, derived as by `serve.noise.draws`."""
    _, for_actions = jax.random.split(jax.random.wrap_key_data(data))
    return jax.random.fold_in(for_actions, number)
