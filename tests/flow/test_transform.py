"""A field on another schedule against the exact field of that schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal
from vla_jax.flow.base import solve
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.schedules import VP, CondOT, Cosine, LinearVP, Polynomial
from vla_jax.flow.transform import change_schedule


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CondOT(), Cosine()),
        (CondOT(), Polynomial(3.0)),
        (Cosine(), CondOT()),
        (LinearVP(), CondOT()),
        (CondOT(), VP()),
    ],
)
def test_change_of_schedule(old, new, mixture):
    moved, exact = change_schedule(mixture(old).velocity, old, new), mixture(new).velocity
    x = normal(0, (9, 2))
    r = jnp.array([0.0, 0.01, 0.2, 0.4, 0.5, 0.7, 0.9, 0.99, 1.0])
    made = jax.jit(moved)(x, r)
    inside = slice(None, -1) if new.infinite_end else slice(None)
    np.testing.assert_allclose(made[inside], exact(x, r)[inside], rtol=1e-6, atol=1e-7)


def test_samples_stay_the_same(mixture):
    """A change of pace does not change where a sample ends."""
    x = normal(0, (5, 2))
    solver = SolverConfig(method="rk4", num_steps=60)
    field = mixture(CondOT()).velocity
    ends = [solve(f, x, solver).x for f in (field, change_schedule(field, CondOT(), Cosine()))]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)
