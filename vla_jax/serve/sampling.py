"""The jitted programs of a policy: images and normalised state to normalised actions, to action tokens, and to text.

All read the prefix once. `model`, `process` and everything after the star are static (another value compiles
another program), except `guidance` and `overlap`, whose values are traced. `keys` [b] has one key per row, so that what
is drawn for a row does not depend on the others (`serve.noise`).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.data.prompts import null_prompt
from vla_jax.flow.base import normal
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.guidance import clean_prefix, mix, soft_inpaint, soft_weights
from vla_jax.flow.processes import Process
from vla_jax.flow.solvers import Field
from vla_jax.models.action_tokens import ActionGrammar, ActionTokens, generate_actions
from vla_jax.models.generate import generate
from vla_jax.models.vla import VLA
from vla_jax.serve.executors.base import Running
from vla_jax.types import Batch, Given, PyTree

Continuation = Literal["vjp", "jacobian_free", "prefix"]
"""How a new chunk is made to continue the one that runs; see `flow.guidance`: the first two are `soft_inpaint`,
prefix is `clean_prefix`, for policies that were trained with `objective.rtc_prefix`."""


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
        return cls(known=known, weight=weight, bound=np.float32(running.bound), how=running.how)

    def repeated(self, samples: int) -> "Overlap":
        """For as many samples of each row, next to each other."""
        known, weight = (jnp.repeat(x, samples, axis=0) for x in (self.known, self.weight))
        return dataclasses.replace(self, known=known, weight=weight)


@functools.partial(jax.jit, static_argnames=("model", "process", "solver", "samples", "see_target"))
def sample_actions(
    params: PyTree,
    batch: Batch,
    keys: PRNGKeyArray,
    *,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    see_target: bool,
    guidance: Float[Array, ""] | float | None = None,
    overlap: Overlap | None = None,
) -> Float[Array, "b S k a"]:
    """`samples` chunks per observation: one prefill, then the solver over [b·S] noisy chunks and one context.

    With `see_target` the expert sees the batch's text target (the plan). `batch.action_mask` says which action
    dimensions exist; in the others the network reads what `model.expert.padding` says, and the caller cuts them off.

    `guidance`: the weight w of the instruction (`sample_guided`). 1 and 0 run the very computation of the
    unguided program, with the instruction and without it, at its cost; None has no such branch at all.
    """
    sample = functools.partial(
        sample_plain, params, keys=keys, model=model, process=process, solver=solver, samples=samples,
        see_target=see_target, overlap=overlap,
    )  # fmt: skip
    if guidance is None:
        return sample(batch)
    guided = functools.partial(
        sample_guided, params, keys=keys, model=model, process=process, solver=solver, samples=samples,
        see_target=see_target, overlap=overlap, guidance=guidance,
    )  # fmt: skip
    one_sided = (guidance == 0) | (guidance == 1)

    def alone(batch: Batch) -> Array:
        null = null_prompt(batch)
        return sample(jax.tree.map(lambda c, n: jnp.where(guidance == 0, n, c), batch, null))

    return jax.lax.cond(one_sided, alone, guided, batch)


def sample_plain(
    params: PyTree,
    batch: Batch,
    *,
    keys: PRNGKeyArray,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    see_target: bool,
    overlap: Overlap | None = None,
) -> Float[Array, "b S k a"]:
    """Without guidance."""
    field = _field(params, batch, model, samples, see_target)
    return _solve(field, batch, keys, model, process, solver, samples, overlap)


def sample_guided(
    params: PyTree,
    batch: Batch,
    *,
    guidance: Float[Array, ""] | float,
    keys: PRNGKeyArray,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    see_target: bool,
    overlap: Overlap | None = None,
) -> Float[Array, "b S k a"]:
    """Classifier-free guidance on language: ``f_null + w (f_prompt - f_null)``, both as one batch of 2b rows.

    The null prompt has no plan either: a plan tells what was asked.
    """
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), batch, null_prompt(batch))
    field = _field(params, both, model, samples, see_target)

    def guided(x: Array, t: Array) -> Array:
        f_c, f_u = jnp.split(field(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
        return mix(f_c, f_u, guidance)

    return _solve(guided, batch, keys, model, process, solver, samples, overlap)


def _field(params: PyTree, batch: Batch, model: VLA, samples: int, see_target: bool) -> Field:
    """One prefill, and the expert's prediction over its context."""
    variables = {"params": params}
    visible = jnp.full((batch.tokens.shape[0],), see_target)
    context, _ = model.apply(variables, batch, visible, method="prefill")
    given = Given.of(batch).repeat(samples)

    def field(x_t, t):
        return model.apply(variables, context, given, x_t, t, method="denoise")

    return field


def _solve(
    field: Field,
    batch: Batch,
    keys: PRNGKeyArray,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    overlap: Overlap | None,
) -> Float[Array, "b S k a"]:
    """From noise to chunks, continuing the one that runs where there is one."""
    expert, rows = model.config.expert, batch.tokens.shape[0]
    shape = (rows * samples, expert.horizon, expert.action_dim)
    if overlap is None:
        chunks = process.sample(field, keys, shape, solver).x
    else:
        mask = True if batch.action_mask is None else jnp.repeat(batch.action_mask, samples, axis=0)
        noise = normal(keys, shape)
        field, noise = continuing(field, overlap.repeated(samples), noise, mask)
        chunks = process.sample(field, keys, shape, solver, noise=noise).x
    return chunks.reshape(rows, samples, expert.horizon, expert.action_dim)


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


@functools.partial(jax.jit, static_argnames=("model", "samples", "see_target", "max_tokens"))
def sample_action_tokens(
    params: PyTree,
    batch: Batch,
    keys: PRNGKeyArray,
    grammar: ActionGrammar,
    temperature: Float[Array, ""] | float,
    *,
    model: VLA,
    samples: int,
    see_target: bool,
    max_tokens: int,
) -> ActionTokens:
    """`samples` chunks per observation as tokens, [b S g]: one prefill, then one token after the other.

    With `see_target` the tokens see the batch's text target (the plan).
    """
    rows = batch.tokens.shape[0]
    visible = jnp.full((rows,), see_target)
    context, _ = model.apply({"params": params}, batch, visible, method="prefill")
    context = context.repeat(samples)
    each = jax.vmap(lambda key: jax.random.split(key, samples))(keys).reshape(-1)
    written = generate_actions(
        model, params, context, grammar, each, max_tokens=max_tokens, temperature=temperature
    )
    return jax.tree.map(lambda x: x.reshape(rows, samples, -1), written)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "eos"))
def decode_text(
    params: PyTree,
    batch: Batch,
    keys: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    *,
    model: VLA,
    max_tokens: int,
    eos: int,
) -> tuple[Int[Array, "b g"], Bool[Array, "b g"]]:
    """The text that follows the prompt and which of its tokens are there (the end token is one of them)."""
    text = generate(model, params, batch, keys, max_tokens=max_tokens, eos=eos, temperature=temperature)
    return text.tokens, text.mask
