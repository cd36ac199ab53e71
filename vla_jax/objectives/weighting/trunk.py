"""The shared trunk: parameters chosen by path, and the gradients' inner products on them."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vla_jax.objectives.weighting.base import Gram
from vla_jax.types import PyTree


def inside(params: PyTree, paths: tuple[str, ...], where: str) -> PyTree:
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


def gram_matrix(gradients: Mapping[str, PyTree], names: Iterable[str], inside: PyTree) -> Gram:
    """g_i · g_j over the trunk for every two of the named losses, on any mesh: sums are over the whole arrays."""
    trees = [chosen(gradients[name], inside) for name in names]
    upper = {(i, j): _dot(trees[i], trees[j]) for j in range(len(trees)) for i in range(j + 1)}
    rows = [[upper[min(i, j), max(i, j)] for j in range(len(trees))] for i in range(len(trees))]
    return jnp.stack([jnp.stack(row) for row in rows])


def chosen(tree: PyTree, inside: PyTree) -> dict[str, Array]:
    """The trunk's leaves by their paths."""
    marks = jax.tree.leaves(inside)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for (path, leaf), mark in zip(leaves, marks) if mark}


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as ``backbone/llm/…``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _dot(a: dict[str, Array], b: dict[str, Array]) -> Array:
    return sum((jnp.sum(a[name] * b[name]) for name in a), start=jnp.zeros(()))


def _under(name: str, path: str) -> bool:
    return f"{name}/".startswith(f"{path.strip('/')}/")


def _nearest(path: str, names: list[str]) -> str:
    known = {"/".join(parts[:i]) for parts in (n.split("/") for n in names) for i in range(1, len(parts) + 1)}
    near = difflib.get_close_matches(path.strip("/"), sorted(known), n=1, cutoff=0)
    return f"; did you mean '{near[0]}'?" if near else ""
