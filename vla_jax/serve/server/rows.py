"""The policy's program over rows that know nothing of each other: every row has its own seed.

`jax.vmap` of the very program that answers one robot. Row i of any batch is the same function of (observation, seed)
that `Policy.act(observation, jax.random.key(seed))` computes, with any process and solver. How the sums in it are
rounded depends on the number of rows (XLA chooses its kernels by shape), but neither on the place of a row in the
batch nor on what the other rows hold; `tests/serve/server/test_engine.py` measures both.
"""

import functools

import jax
from jaxtyping import Array, Float, Int

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Process
from vla_jax.models.action_tokens import ActionGrammar, ActionTokens
from vla_jax.models.vla import VLA
from vla_jax.serve.sampling import sample_action_tokens, sample_guided, sample_plain
from vla_jax.types import Batch, PyTree


@functools.partial(jax.jit, static_argnames=("model", "process", "solver", "samples", "see_target"))
def act_rows(
    params: PyTree,
    batch: Batch,
    seeds: Int[Array, " b"],
    *,
    model: VLA,
    process: Process,
    solver: SolverConfig,
    samples: int,
    see_target: bool,
    guidance: Float[Array, " b"] | None = None,
) -> Float[Array, "b S k a"]:
    """`samples` chunks per row in the model's units; the noise of a row is `Policy.act`'s for its seed.

    `guidance`: every row's own weight of its instruction, neither 0 nor 1 (those need no guidance). None: all 1.
    """

    def one(row: Batch, seed: Int[Array, ""], w: Float[Array, ""] | None) -> Float[Array, "S k a"]:
        _, for_noise = jax.random.split(jax.random.key(seed))
        sample = sample_plain if w is None else functools.partial(sample_guided, guidance=w)
        return sample(
            params,
            jax.tree.map(lambda leaf: leaf[None], row),
            key=jax.random.fold_in(for_noise, 0),
            model=model,
            process=process,
            solver=solver,
            samples=samples,
            see_target=see_target,
        )[0]

    return jax.vmap(one)(batch, seeds, guidance)


@functools.partial(jax.jit, static_argnames=("model", "samples", "see_target", "max_tokens"))
def act_token_rows(
    params: PyTree,
    batch: Batch,
    seeds: Int[Array, " b"],
    grammar: ActionGrammar,
    temperature: float,
    *,
    model: VLA,
    samples: int,
    see_target: bool,
    max_tokens: int,
) -> ActionTokens:
    """`act_rows` of a policy that writes its chunks as tokens, [b S g]."""

    def one(row: Batch, seed: Int[Array, ""]) -> ActionTokens:
        _, for_noise = jax.random.split(jax.random.key(seed))
        written = sample_action_tokens(
            params,
            jax.tree.map(lambda leaf: leaf[None], row),
            jax.random.fold_in(for_noise, 0),
            grammar,
            temperature,
            model=model,
            samples=samples,
            see_target=see_target,
            max_tokens=max_tokens,
        )
        return jax.tree.map(lambda leaf: leaf[0], written)

    return jax.vmap(one)(batch, seeds)
