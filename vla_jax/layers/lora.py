"""LoRA as a function of the parameter tree (Hu et al. 2021, arXiv:2106.09685, §4.1): x·W + (α/r)·(x·A)·B.

    params = attach(key, params, names, rank=16)         # …/w  gets a sibling  …/w_lora/{a, b}
    network.apply({"params": scaled(params, scale)}, …)  # scale = α / rank

No module declares A or B: whatever multiplies with a matrix (`layers/linear.py`) takes along what lies beside it. B
starts at zero, so the first step computes what the weights did before. All heads are one matrix: of `q_einsum/w`
[layers n d e], A is [layers d r] and B [layers r n e].

`merge` adds A·B to W, in float32. Whoever then multiplies in bfloat16 rounds the sum, and with a W that was exact in
bfloat16 the small entries of A·B with it: merged weights are for products in float32 and for other libraries.
"""

import math
import string
import zlib
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.layers.linear import SUFFIX
from vla_jax.layers.matrices import MatrixAxes, matrix_axes


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


def scaled(params: Any, scale: float) -> Any:
    """The tree with every B times `scale`: what the network is applied to."""

    def times(path: KeyPath, leaf: Array) -> Array:
        return scale * leaf if is_factor(name := _name(path)) and name.endswith("/b") else leaf

    return jax.tree_util.tree_map_with_path(times, params)


def has_factors(params: Any) -> bool:
    """Whether any matrix of the tree has A and B beside it."""
    return any(is_factor(_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def merge(params: Any, scale: float, above: str = "") -> Any:
    """The plain tree: every W with A and B beside it becomes W + scale·A·B, float32; all else is left as it is.

    `above` is the path of the tree itself, where it is a part of a larger one.
    """
    if not isinstance(params, dict):
        return params
    merged = {}
    for name, value in params.items():
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in params:
            continue
        path, factors = f"{above}{name}", params.get(name + SUFFIX)
        if factors is None:
            merged[name] = merge(value, scale, f"{path}/")
        else:
            merged[name] = value.astype(jnp.float32) + scale * product(path, factors["a"], factors["b"])
    return merged


def product(
    path: str, a: Float[Array | np.ndarray, "*inputs r"], b: Float[Array | np.ndarray, "..."]
) -> Float[Array, "..."]:
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


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _factors(key: PRNGKeyArray, path: str, w: Any, rank: int) -> dict[str, Any]:
    into, outof = _axes(path)
    shape = nn.unbox(w).shape
    batch = range(len(shape) - len(into) - len(outof))
    std = math.prod(shape[i] for i in into) ** -0.5
    a_shape = (*(shape[i] for i in batch), *(shape[i] for i in into), rank)
    b_shape = (*(shape[i] for i in batch), rank, *(shape[i] for i in outof))
    a, b = std * jax.random.normal(key, a_shape), jnp.zeros(b_shape)
    if not isinstance(w, meta.Partitioned):
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
