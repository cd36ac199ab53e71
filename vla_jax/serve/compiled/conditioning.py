"""What the flow time does to the expert, apart from it: a function of t alone, so it can be computed at load.

π0 adds a bias to the first layer of the action tokens' MLP; π0.5 scales, shifts and gates every norm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.config import ADAPTIVE, SolverConfig
from vla_jax.flow.processes import Process
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import embed_clock
from vla_jax.types import PyTree


class Condition(NamedTuple):
    """One or the other; #r #t: broadcast over rows and tokens."""

    bias: Float[Array, "#r #t d"] | None = None
    layers: Float[Array, "layers 2 3 #r #t d"] | None = None
    """For both norms of each block: scale, shift, gate."""
    final: Float[Array, "3 #r #t d"] | None = None


def condition(weights: PyTree, model: VLAConfig, t: Float[Array, "r t"]) -> Condition:
    """The conditioning at times t, one per row and token. `weights` are the expert's."""
    embedded = embed_clock(t, model.expert)
    if model.expert.time == "mlp":
        return Condition(bias=_dense(weights["time"], embedded))
    inner = jax.nn.swish(_dense(weights["time"]["time_mlp_in"], embedded))
    inner = jax.nn.swish(_dense(weights["time"]["time_mlp_out"], inner))
    modulation = weights["modulation"]
    norms = [modulation["layers"][name] for name in ("pre_attention_norm", "pre_ffw_norm")]
    layers = jnp.stack([jax.vmap(lambda w: _three(_dense(w, inner)))(norm) for norm in norms], axis=1)
    return Condition(layers=layers, final=_three(_dense(modulation["final"], inner)))


def table(weights: PyTree, model: VLAConfig, times: Float[np.ndarray, " u"]) -> Condition:
    """The conditioning at each of some times, along a leading axis."""
    return jax.lax.map(lambda t: condition(weights, model, t[None, None]), jnp.asarray(times, jnp.float32))


def suffix(actions: Condition, clean: Condition, horizon: int) -> Condition:
    """Adaptive conditioning of [state][actions]: the state token is clean data, t = 1."""
    if actions.layers is None:
        return actions

    def joined(first: Array, rest: Array) -> Array:
        rest = jnp.broadcast_to(rest, (*rest.shape[:-2], horizon, rest.shape[-1]))
        first = jnp.broadcast_to(first, (*rest.shape[:-2], *first.shape[-2:]))
        return jnp.concatenate([first, rest], axis=-2)

    return Condition(layers=joined(clean.layers, actions.layers), final=joined(clean.final, actions.final))


def evaluation_times(
    process: Process, solver: SolverConfig, shape: tuple[int, ...]
) -> Float[np.ndarray, " u"] | None:
    """The times, without repetitions, at which a solver asks the field; None where they depend on its answers.

    Found by running the very sampler on a field that answers zeros and writes down when it was asked.
    """
    if solver.method in ADAPTIVE:
        return None
    asked: list[float] = []

    def field(x, t):
        asked.append(float(np.asarray(t).reshape(-1)[0]))
        return jnp.zeros_like(x)

    with jax.disable_jit(), jax.default_device(jax.devices("cpu")[0]):
        process.sample(field, jax.random.key(0), (1, *shape[1:]), solver)
    return np.unique(np.asarray(asked, np.float32))


def _dense(weights: PyTree, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
    return x @ weights["kernel"] + weights["bias"]


def _three(x: Float[Array, "*b 3d"]) -> Float[Array, "3 *b d"]:
    return jnp.stack(jnp.split(x, 3, axis=-1))
