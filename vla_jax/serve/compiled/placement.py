"""Where the compiled network's weights lie on a mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vla_jax.sharding.mesh import replicated
from vla_jax.types import PyTree


def shard_weights(weights: PyTree, mesh: Mesh) -> PyTree:
    """Feed-forward widths and query heads over `tensor`; everything else whole on every device.

    q, k and v must be apart (`weights.rewrite(split_qkv=True)`). Raises ValueError where an axis does not divide.
    """
    parts = mesh.shape["tensor"]

    def place(path: tuple, leaf: Array) -> Array:
        names = [
            str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", "")))) for entry in path
        ]
        axis = None if parts == 1 else _split_axis(names)
        if axis is None:
            return jax.device_put(leaf, replicated(mesh))
        if leaf.shape[axis] % parts:
            raise ValueError(
                f"weight {'/'.join(names)} {leaf.shape} cannot be split into mesh.tensor={parts} along axis {axis}; "
                "use a smaller mesh.tensor"
            )
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = "tensor"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, weights)


def _split_axis(names: list[str]) -> int | None:
    """Which axis of a weight lies on `tensor`, by the end of its path; None: none."""
    if "scale" in names or "last" in names:
        return None
    for name, axis in {"down": -2, "out": -2}.items():
        if name in names:  # inputs: W's and A's, while B has none of them
            return None if names[-1] == "b" else axis
    if names[-1] == "a":  # the rank is whole everywhere
        return None
    if "up" in names:
        return -1
    if "qkv" in names and ("vision" in names or names[names.index("qkv") + 1] == "0"):
        return -2
    return None
