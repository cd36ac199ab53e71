"""The jitted programs of a policy: images and normalised state to normalised actions, to action tokens, and to text.

All read the prefix once. `model`, `process` and everything after the star are static: another value compiles
another program.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Process
from vla_jax.models.action_tokens import ActionGrammar, ActionTokens, generate_actions
from vla_jax.models.generate import generate
from vla_jax.models.vla import VLA
from vla_jax.types import Batch, PyTree


@functools.partial(jax.jit, static_argnames=("model", "process", "solver", "samples", "see_target"))
def sample_actions(
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    see_target: bool,
) -> Float[Array, "b S k a"]:
    """`samples` chunks per observation: one prefill, then the solver over [b·S] noisy chunks and one cache.

    With `see_target` the expert sees the batch's text target (the plan). `batch.action_mask` says which action
    dimensions exist; the others hold zeros to the network and are to be cut off by the caller.
    """
    variables = {"params": params}
    expert = model.config.expert
    rows = batch.tokens.shape[0]
    visible = jnp.full((rows,), see_target)
    cache, _ = model.apply(variables, batch, visible, method="prefill")
    state = jnp.repeat(batch.state, samples, axis=0)
    mask = None if batch.action_mask is None else jnp.repeat(batch.action_mask, samples, axis=0)

    def field(x_t, t):
        return model.apply(variables, cache, state, x_t, t, mask, method="denoise")

    shape = (rows * samples, expert.horizon, expert.action_dim)
    chunks = process.sample(field, key, shape, solver).x
    return chunks.reshape(rows, samples, expert.horizon, expert.action_dim)


@functools.partial(jax.jit, static_argnames=("model", "samples", "see_target", "max_tokens"))
def sample_action_tokens(
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray,
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
    cache, _ = model.apply({"params": params}, batch, visible, method="prefill")
    cache = cache.replace(
        keys=jnp.repeat(cache.keys, samples, axis=1),
        values=jnp.repeat(cache.values, samples, axis=1),
        mask=jnp.repeat(cache.mask, samples, axis=0),
        visible=jnp.repeat(cache.visible, samples, axis=0),
        positions=jnp.repeat(cache.positions, samples, axis=0),
    )
    keys = jax.random.split(key, rows * samples)
    written = generate_actions(
        model, params, cache, grammar, keys, max_tokens=max_tokens, temperature=temperature
    )
    return jax.tree.map(lambda x: x.reshape(rows, samples, -1), written)


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "eos"))
def decode_text(
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    *,
    model: VLA,
    max_tokens: int,
    eos: int,
) -> tuple[Int[Array, "b g"], Bool[Array, "b g"]]:
    """The text that follows the prompt and which of its tokens are there (the end token is one of them)."""
    text = generate(model, params, batch, key, max_tokens=max_tokens, eos=eos, temperature=temperature)
    return text.tokens, text.mask
