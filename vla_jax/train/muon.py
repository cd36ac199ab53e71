"""Muon for a VLA's matrices (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982), Adam for the rest.

Muon replaces the momentum of a matrix by the nearest orthogonal one, so that every direction learns at one speed.
Which axes of a parameter are a matrix, `layers/matrices.py` says.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from vla_jax.layers import matrices
from vla_jax.sharding.rules import is_box, path_name
from vla_jax.train.moments import with_moment_in
from vla_jax.types import PyTree

MEANINGFUL = ("action_in_proj", "action_out_proj", "state_proj")
"""Projections from and to axes of which each means something of its own: turning them makes no sense."""

RMS = 0.2
"""Root mean square of an update at learning rate 1: about AdamW's, so that both take the same learning rate."""


def scale_by_muon(beta1: float, beta2: float, eps: float, moment_dtype: str) -> optax.GradientTransformation:
    """The direction of a step of size 1: Muon's for matrices, Adam's for vectors, tables and actions."""
    muon = optax.chain(
        _without_constants(
            with_moment_in(
                moment_dtype,
                contrib.scale_by_muon(
                    ns_steps=4, preconditioning="schatten", weight_dimension_numbers=matrix_axes
                ),
            )
        ),
        optax.stateless(_scale),
    )
    adam = with_moment_in(moment_dtype, optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps))
    return optax.partition({"muon": muon, "adam": adam}, _labels)


def matrix_axes(params: PyTree) -> PyTree:
    """For every parameter the axes of its matrix, or None where Adam moves it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path_name(path)), params, is_leaf=is_box)


def _axes(name: str) -> contrib.MuonDimensionNumbers | None:
    if any(part in MEANINGFUL for part in name.split("/")):
        return None
    axes = matrices.matrix_axes(name)
    return None if axes is None else contrib.MuonDimensionNumbers(*map(_plain, axes))


def _plain(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    """A single axis as optax writes it."""
    return axes[0] if len(axes) == 1 else axes


def _scale(updates: PyTree, params: PyTree | None = None) -> PyTree:
    """An orthogonal m × n matrix has entries of root mean square 1 / √max(m, n): brings all to RMS."""
    del params

    def scale(path, update):
        axes = _axes(path_name(path))
        assert axes is not None  # `_labels` lets only matrices come here
        sizes = (math.prod(update.shape[i] for i in np.atleast_1d(side)) for side in axes)
        return update * (RMS * max(sizes) ** 0.5)

    return jax.tree_util.tree_map_with_path(scale, updates)


def _labels(params: PyTree) -> PyTree:
    def label(path, _) -> str:
        return "adam" if _axes(path_name(path)) is None else "muon"

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_box)


def _muon_state(state: Any) -> contrib.MuonState:
    """What optax declares as any tree, and is this."""
    assert isinstance(state, contrib.MuonState)
    return state


def _without_constants(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps Muon's polynomial out of its state: it is no array that training changes, shards or saves."""
    coefficients = _muon_state(tx.init({})).ns_coeffs

    def init(params):
        return _muon_state(tx.init(params))._replace(ns_coeffs=None)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state._replace(ns_coeffs=coefficients), params)
        return updates, _muon_state(state)._replace(ns_coeffs=None)

    return optax.GradientTransformation(init, update)
