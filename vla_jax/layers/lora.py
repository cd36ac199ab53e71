"""LoRA as a function of the parameter tree (Hu et al. 2021, arXiv:2106.09685, §4.1): W + (α/r)·A·B.

    params = attach(key, params, names, rank=16)       # …/w  gets a sibling  …/w_lora/{a, b}
    network.apply({"params": merge(params, scale)}, …)  # scale = α / rank

A module is not changed and does not know of it: the network is always applied to merged weights, in training too,
so that what is trained is what is exported. B starts at zero, so the first step computes what the weights did before.
All heads are one matrix: of `q_einsum/w` [layers n d e], A is [layers d r] and B [layers r n e].
"""

import math
import string
import zlib
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.layers.matrices import MatrixAxes, matrix_axes

SUFFIX = "_lora"


def attach(key: PRNGKeyArray, params: Any, names: Collection[str], rank: int) -> Any:
    """The tree with A and B beside every matrix of `names` (paths), float32: A normal with variance 1/inputs, B zero.

    Boxed parameters (with logical axis names) give boxed A and B: the rank's axis has no name, all others keep theirs.
    Raises ValueError where a name is no matrix.
    """

    def walk(tree: dict[str, Any], above: str) -> dict[str, Any]:
        found = {}
        for name, value in tree.items():
            path = f"{above}{name}"
            found[name] = walk(value, f"{path}/") if isinstance(value, dict) else value
            if path in names:
                # a key by name, not by number: another choice of modules does not change this one's start
                found[name + SUFFIX] = _factors(
                    jax.random.fold_in(key, zlib.crc32(path.encode())), path, value, rank
                )
        return found

    return walk(params, "")


def merge(
    params: Any, scale: float, above: str = "", dtype: Callable[[str], Any] = lambda path: jnp.float32
) -> Any:
    """The plain tree: every W with A and B beside it becomes W + scale·A·B; all else is left as it is.

    `above` is the path of the tree itself, where it is a part of a larger one. The sum is float32, and then rounded to
    the type that `dtype` says for a path.
    """
    if not isinstance(params, dict):
        return params
    merged = {}
    for name, value in params.items():
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in params:
            continue
        path, factors = f"{above}{name}", params.get(name + SUFFIX)
        if factors is None:
            merged[name] = merge(value, scale, f"{path}/", dtype)
        else:
            whole = value.astype(jnp.float32) + scale * product(path, factors["a"], factors["b"])
            merged[name] = whole.astype(dtype(path))
    return merged


def product(path: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """A·B with the axes of the matrix at `path`; leading axes (layers) may be cut, of both alike."""
    into, outof = _axes(path)
    batch = a.ndim - 1 - len(into)
    letters = string.ascii_lowercase[: batch + len(into) + len(outof)]
    where = {axis: letters[axis] for axis in (*into, *outof)}
    w, rank = letters[:batch], "z"
    spelt = (
        f"{w}{''.join(where[i] for i in into)}{rank},{w}{rank}{''.join(where[i] for i in outof)}->{letters}"
    )
    return jnp.einsum(spelt, a, b)


def is_factor(path: str) -> bool:
    """Whether a path is that of an A or a B."""
    return any(part.endswith(SUFFIX) for part in path.split("/"))


def _factors(key: PRNGKeyArray, path: str, w: Any, rank: int) -> dict[str, Any]:
    into, outof = _axes(path)
    shape = nn.unbox(w).shape
    batch = range(len(shape) - len(into) - len(outof))
    std = math.prod(shape[i] for i in into) ** -0.5
    a_shape = (*(shape[i] for i in batch), *(shape[i] for i in into), rank)
    b_shape = (*(shape[i] for i in batch), rank, *(shape[i] for i in outof))
    a, b = std * jax.random.normal(key, a_shape), jnp.zeros(b_shape)
    if not isinstance(w, meta.AxisMetadata):
        return {"a": a, "b": b}
    names = w.names
    lead = tuple(names[i] for i in batch)
    return {
        "a": nn.LogicallyPartitioned(a, (*lead, *(names[i] for i in into), None)),
        "b": nn.LogicallyPartitioned(b, (*lead, None, *(names[i] for i in outof))),
    }


def _axes(path: str) -> MatrixAxes:
    axes = matrix_axes(path)
    if axes is None:
        raise ValueError(f"{path} is no matrix, so it can have no LoRA")
    return axes
