"""From a checkpoint's parameters to those that are served: of the same network, in the form in which it runs fastest.

Matrices of the stacked blocks and tables take the network's type, or the matrices become 8-bit integers; stacks come
apart, and their matrices lie in the order in which they multiply. LoRA's factors stay beside matrices that are rounded,
and are merged into those that stay float32, which loses nothing.
"""

import functools
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Array

from vla_jax.layers import lora
from vla_jax.layers.int8 import quantize
from vla_jax.layers.linear import SCALE, TURNED
from vla_jax.layers.matrices import matrix_axes
from vla_jax.models.abstract import abstract_params
from vla_jax.models.config import VLAConfig
from vla_jax.models.stack import STACKS, unstacked
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.sharding import shardings
from vla_jax.sharding.mesh import replicated
from vla_jax.sharding.rules import path_name
from vla_jax.types import PyTree


def served(params: PyTree, model: VLAConfig, config: CompileConfig, mesh: Mesh | None = None) -> PyTree:
    """The parameters to serve; `params` has LoRA's scale in its factors (`Policy.params`).

    On a mesh matrices keep the order of their axes, which training's rules know.
    """
    dtype, int8 = jnp.dtype(config.dtype or model.dtype), config.weights == "int8"
    if dtype == jnp.float32 and not int8:
        params = lora.merge(params, 1.0)
    if dtype != jnp.float32 or int8:
        params = _kept(params, dtype, int8, {f"backbone/{name}" for name in model.backbone.tables})
    if not config.rewrites.unstack:
        return params
    params = unstacked(params)
    return _turned(params) if mesh is None else params


def size_bytes(params: PyTree) -> int:
    """Bytes of all arrays together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _kept(
    tree: dict[str, Any], dtype: jnp.dtype, int8: bool, tables: Collection[str], above: str = ""
) -> dict[str, Any]:
    """The tree with its blocks' matrices, and tables, in the form in which they are kept."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            kept[name] = _kept(value, dtype, int8, tables, f"{path}/")
        elif path in tables:
            kept[name] = value.astype(dtype)
        elif not set(STACKS) & set(path.split("/")):
            kept[name] = value
        elif lora.is_factor(path):
            kept[name] = value.astype(dtype)
        elif (axes := matrix_axes(path)) is None:
            kept[name] = value
        elif int8:
            kept[name], kept[name + SCALE] = jax.jit(functools.partial(quantize, into=axes.into))(value)
        else:
            kept[name] = value.astype(dtype)
    return kept


def _turned(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The tree with the matrices of layers that lie apart, and of no stack, in the order in which they multiply.

    XLA on CPU transposes any other order anew at every evaluation. Scans slice their stack along its first axis, so
    stacks stay as they are.
    """
    turned: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        axes = None if isinstance(value, dict) or lora.is_factor(path) else matrix_axes(path)
        if isinstance(value, dict):
            turned[name] = value if name in STACKS else _turned(value, f"{path}/")
        elif axes is None:
            turned[name] = value
        else:
            into = [axis % value.ndim for axis in axes.into]
            order = into + [axis for axis in range(value.ndim) if axis not in into]
            same = order == list(range(value.ndim))
            turned[name if same else name + TURNED] = value if same else jnp.transpose(value, order)
    return turned


def placed(params: PyTree, model: VLAConfig, mesh: Mesh | None) -> PyTree:
    """On the device to stay; on a mesh as training would lay them (`sharding/rules.py`).

    What training does not know of (scales of integers, LoRA's factors) lies on every device. Raises ValueError where an
    axis does not divide.
    """
    if mesh is None:
        return jax.device_put(params, jax.devices()[0])
    leaves = jax.tree_util.tree_leaves_with_path(shardings(abstract_params(model), mesh))
    known = {path_name(path): sharding for path, sharding in leaves}

    def place(path: KeyPath, leaf: Array) -> NamedSharding:
        name = path_name(path)
        if name in known:
            return known[name]
        stack = next((s for s in STACKS if re.search(rf"(^|/){s}_\d+/", name)), None)
        stacked = known.get(re.sub(rf"{stack}_\d+/", f"{stack}/", name)) if stack else None
        if stacked is None:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*stacked.spec[1:]))

    return jax.device_put(params, jax.tree_util.tree_map_with_path(place, params))
