"""The program of a policy that writes its chunks as tokens, over rows that know nothing of each other.

`jax.vmap` of the very program that answers one robot: row i of any batch is the same function of (observation, seed)
that `Policy.act(observation, jax.random.key(seed))` computes. How the sums in it are rounded depends on the number of
rows (XLA chooses its kernels by shape), but neither on the place of a row in the batch nor on what the other rows hold.
"""

import functools

import jax
from jaxtyping import Array, Int

from vla_jax.models.action_tokens import ActionGrammar, ActionTokens
from vla_jax.models.vla import VLA
from vla_jax.serve.sampling import sample_action_tokens
from vla_jax.types import Batch, PyTree


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
    """`samples` chunks per row as tokens, [b S g]; a row's draws are `Policy.act`'s for its seed."""

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
