"""The shared trunk: parameters chosen by path, and the gradients' inner products on them."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vla_jax.objectives.weighting.base import Pair, Products


def inside(params: Any, paths: tuple[str, ...], where: str) -> Any:
    """A tree of bools: True for parameters that are, or lie under, one of `paths` (``backbone/llm/layers``).

    Raises ValueError where a path holds no parameter; `where` names the option in the message.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path in paths:
        if not any(_under(name, path) for name in names):
            raise ValueError(f"{where}: no parameter lies under '{path}'{_nearest(path, names)}")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(_under(path_name(path), p) for p in paths), params
    )


def products(gradients: Pair, inside: Any) -> Products:
    """‖g_text‖², ‖g_action‖² and g_text · g_action over the trunk, on any mesh: sums are over the whole arrays."""
    text, action = (chosen(tree, inside) for tree in gradients)
    return Products(_dot(text, text), _dot(action, action), _dot(text, action))


def chosen(tree: Any, inside: Any) -> dict[str, Array]:
    """The trunk's leaves by their paths."""
    marks = jax.tree.leaves(inside)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for (path, leaf), mark in zip(leaves, marks) if mark}


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as ``backbone/llm/…``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _dot(a: dict[str, Array], b: dict[str, Array]) -> Array:
    return sum(jnp.sum(a[name] * b[name]) for name in a)


def _under(name: str, path: str) -> bool:
    return f"{name}/".startswith(f"{path.strip('/')}/")


def _nearest(path: str, names: list[str]) -> str:
    known = {"/".join(parts[:i]) for parts in (n.split("/") for n in names) for i in range(1, len(parts) + 1)}
    near = difflib.get_close_matches(path.strip("/"), sorted(known), n=1, cutoff=0)
    return f"; did you mean '{near[0]}'?" if near else ""
