"""The jitted programs of a policy: images and normalised state to normalised actions, to action tokens, and to text.

All read the prefix once. `model`, `process` and everything after the star are static (another value compiles
another program), except `guidance` and `overlap`, whose values are traced. `keys` [b] has one key per row, so that what
is drawn for a row does not depend on the others (`serve.noise`). `serve.compiled` runs the same `sample_chunks`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.data.prompts import null_prompt
from vla_jax.flow.base import normal
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.guidance import clean_prefix, mix, soft_inpaint, soft_weights
from vla_jax.flow.processes import Process
from vla_jax.flow.solvers import Field
from vla_jax.models.action_tokens import ActionGrammar, GeneratedTokens, generate_actions
from vla_jax.models.experts.base import is_time
from vla_jax.models.generate import generate
from vla_jax.models.vla import VLA
from vla_jax.serve.executors.base import Continuation, Running
from vla_jax.serve.schedule import ConditionTable
from vla_jax.types import Batch, Context, Given, PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("known", "weight", "bound"), meta_fields=("how",)
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """The rest of the chunk that runs, from the new chunk's first step on, in the model's units."""

    known: Float[Array, "b k a"]
    """What it plans for each step; anything where `weight` is 0."""
    weight: Float[Array, "b k"]
    """How much of it is to be kept: 1 held, 0 free."""
    bound: Float[Array, ""] | float = 5.0
    """Largest strength of soft inpainting (β of 2506.07339)."""
    how: Continuation = "vjp"

    @classmethod
    def of(cls, running: Running, known: Float[Array | np.ndarray, "b k a"]) -> "Overlap":
        """How much of a running chunk `known` is to be kept."""
        end = running.delay if running.how == "prefix" else running.end
        weight = np.asarray(soft_weights(known.shape[1], running.delay, end))
        weight = np.broadcast_to(weight, known.shape[:2])
        host: dict[str, Any] = dict(known=known, weight=weight, bound=np.float32(running.bound))
        return cls(**host, how=running.how)

    def repeated(self, samples: int) -> "Overlap":
        """For as many samples of each row, next to each other."""
        known, weight = (jnp.repeat(x, samples, axis=0) for x in (self.known, self.weight))
        return dataclasses.replace(self, known=known, weight=weight)


@functools.partial(jax.jit, static_argnames=("model", "process", "solver", "samples", "plan_visible"))
def sample_actions(
    params: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    *,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    plan_visible: bool,
    guidance: Float[Array, ""] | float | None = None,
    overlap: Overlap | None = None,
) -> Float[Array, "b S k a"]:
    """`samples` chunks per observation: one prefill, then the solver over [b·S] noisy chunks and one context.

    With `plan_visible` the expert sees the batch's text target (the plan). `batch.action_mask` says which action
    dimensions exist; in the others the network reads what `model.expert.padding` says, and the caller cuts them off.
    `guidance`: the weight of the instruction; None: the plain field, at half the cost.
    """
    context = read(model, params, batch, plan_visible=plan_visible, guided=guidance is not None)
    weights = None if guidance is None else jnp.broadcast_to(guidance, batch.tokens.shape[:1])
    how = Sampling(model, process, solver, samples)
    return sample_chunks(how, params, context, Given.of(batch), keys, guidance=weights, overlap=overlap)


def read(model: VLA, params: PyTree, batch: Batch, *, plan_visible: bool, guided: bool) -> Context:
    """The context of a batch; guided, that of its null prompts comes behind it (2b rows), with the images encoded once.

    The null prompt has no plan either: a plan tells what was asked.
    """
    if guided:
        null = null_prompt(batch)
        texts = ("tokens", "token_mask", "token_causal", "token_loss")
        batch = batch.replace(
            **{name: jnp.concatenate([getattr(batch, name), getattr(null, name)]) for name in texts}
        )
    visible = jnp.full((batch.tokens.shape[0],), plan_visible)
    return model.apply({"params": params}, batch, visible, method="prefill")[0]


class Sampling(NamedTuple):
    """Everything about sampling that is compiled in; whatever else changes is an argument."""

    model: VLA
    process: Process
    solver: SolverConfig
    samples: int
    """Chunks per observation."""
    prepare: bool = True
    """Whether what all evaluations of a chunk have in common is computed once (`Expert.prepare`)."""


def sample_chunks(
    how: Sampling,
    params: PyTree,
    context: Context,
    given: Given,
    keys: Key[Array, " b"],
    *,
    schedule: ConditionTable | None = None,
    guidance: Float[Array, " b"] | None = None,
    overlap: Overlap | None = None,
) -> Float[Array, "b S k a"]:
    """From noise to chunks, in the model's units and dimensions.

    `schedule`: what depends on time alone, computed before; without, at every evaluation. `guidance`: weights of the
    instructions, with a context of 2b rows (`read`): classifier-free, ``f_null + w (f_prompt - f_null)``, both as one
    batch (Ho & Salimans 2207.12598, eq. 6). `overlap`: the chunks that run, [b], which the new ones continue.
    """

    def apply(method: str, *args: Any) -> Any:
        return how.model.apply({"params": params}, *args, method=method)

    expert, rows, mask = how.model.config.expert, keys.shape[0], given.action_mask
    shape = (rows * how.samples, expert.horizon, expert.action_dim)
    if guidance is not None:
        given = jax.tree.map(lambda x: jnp.concatenate([x, x]), given)
        guidance = jnp.repeat(guidance, how.samples)[:, None, None]
    if how.prepare:
        context, given = apply("prepare", context, given)
    given = given.repeat(how.samples)

    def predict(x: Array, at: Any) -> Array:
        if is_time(at) and at.shape[0] == 1:
            at = jnp.broadcast_to(at, (x.shape[0], *at.shape[1:]))
        return apply("denoise", context, given, x, at)

    def field(x: Array, t: Array, at: Any = None) -> Array:
        if at is None:
            at = t if schedule is None or t.ndim > 1 else schedule.nearest(t[0])
        if guidance is None:
            return predict(x, at)
        if at is t:  # of each row its own; all else is the same for all rows
            at = jnp.concatenate([t, t])
        prompted, null = jnp.split(predict(jnp.concatenate([x, x]), at), 2)
        return mix(prompted, null, guidance)

    return _solved(how, field, keys, shape, schedule, overlap, mask).reshape(rows, how.samples, *shape[1:])


def _solved(
    how: Sampling,
    field: Field,
    keys: Key[Array, " b"],
    shape: tuple[int, ...],
    schedule: ConditionTable | None,
    overlap: Overlap | None,
    mask: Bool[Array, "b k a"] | None,
) -> Float[Array, "bS k a"]:
    sample = functools.partial(how.process.sample, key=keys, shape=shape, solver=how.solver)
    if overlap is not None:
        each = True if mask is None else jnp.repeat(mask, how.samples, axis=0)
        field, noise = continuing(field, overlap.repeated(how.samples), normal(keys, shape), each)
        return sample(field, noise=noise).x
    if schedule is not None and schedule.by_stage:
        return sample(field, stages=schedule.entries).x
    return sample(field).x


def continuing(
    field: Field, overlap: Overlap, noise: Float[Array, "b k a"], mask: Bool[Array, "#b #k a"] | bool
) -> tuple[Field, Float[Array, "b k a"]]:
    """The field and the noise with which a solver continues the chunk that runs; `mask`: dimensions that exist."""
    known, weight = overlap.known, overlap.weight[..., None]
    if overlap.how == "prefix":
        held = weight > 0
        return clean_prefix(field, known, held), jnp.where(held, known, noise)
    weight, jacobian = weight * mask, overlap.how == "vjp"
    return soft_inpaint(field, known, weight, bound=overlap.bound, jacobian=jacobian), noise


@functools.partial(jax.jit, static_argnames=("model", "samples", "plan_visible", "max_tokens"))
def sample_action_tokens(
    params: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    grammar: ActionGrammar,
    temperature: Float[Array, ""] | float,
    *,
    model: VLA,
    samples: int,
    plan_visible: bool,
    max_tokens: int,
) -> GeneratedTokens:
    """`samples` chunks per observation as tokens, [b S g]: one prefill, then one token after the other.

    With `plan_visible` the tokens see the batch's text target (the plan).
    """
    rows = batch.tokens.shape[0]
    context = read(model, params, batch, plan_visible=plan_visible, guided=False).repeat(samples)
    each = jax.vmap(lambda key: jax.random.split(key, samples))(keys).reshape(-1)
    written = generate_actions(
        model, params, context, grammar, each, max_tokens=max_tokens, temperature=temperature
    )
    return jax.tree.map(lambda x: x.reshape(rows, samples, -1), written)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "eos"))
def decode_text(
    params: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    temperature: Float[Array, ""] | float,
    *,
    model: VLA,
    max_tokens: int,
    eos: int,
) -> tuple[Int[Array, "b g"], Bool[Array, "b g"]]:
    """The text that follows the prompt and which of its tokens are there (the end token is one of them)."""
    text = generate(model, params, batch, keys, max_tokens=max_tokens, eos=eos, temperature=temperature)
    return text.tokens, text.mask
