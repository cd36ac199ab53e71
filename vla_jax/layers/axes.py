"""Logical names of activations' axes: what they mean on the mesh, if the table of rules is active.

Which names there are stands in vla_jax/sharding/rules.py, and `vla_jax.sharding.activate` makes them mean something.
Flax copies an axis whose name has no rule to every device, without a word; here such a name is an error.
"""

import difflib
from collections.abc import Sequence

import flax.linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array


def constrain(x: Array, names: Sequence[str | None]) -> Array:
    """`x`, laid out as the names of its axes say; itself where no rules are active.

    Raises ValueError where the active rules lack a name, or a name or an axis is left over.
    """
    if nn.get_logical_axis_rules() and len(names) != x.ndim:
        raise ValueError(f"an activation {x.shape} has {x.ndim} axes, but {len(names)} names: {tuple(names)}")
    _check(names)
    return nn.with_logical_constraint(x, tuple(names))


def mesh_axes(names: Sequence[str | None]) -> PartitionSpec:
    """Where axes of these names lie on the mesh. Raises ValueError where the active rules lack a name."""
    _check(names)
    spec = nn.logical_to_mesh_axes(tuple(names))
    return PartitionSpec() if spec is None else spec


def _check(names: Sequence[str | None]) -> None:
    known = {name for name, _ in nn.get_logical_axis_rules()}
    for name in names:
        if known and name is not None and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)[0]
            raise ValueError(
                f"activation {tuple(names)}: axis '{name}' is not in vla_jax/sharding/rules.py; "
                f"did you mean '{near}'?"
            )
