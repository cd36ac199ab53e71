"""Conversions: round trips, and at the ends a finite number or a plain refusal."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flow.conftest import ALL
from vla_jax.flow.paths import AffinePath
from vla_jax.flow.predictions import Kind, convert, data_and_noise, from_data_and_noise, undefined

KINDS = get_args(Kind)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ALL),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_round_trips(schedule, source, target, t, seed):
    x1, eps = jax.random.normal(jax.random.key(seed), (2, 2, 3))
    t = jnp.full(2, t)
    x = AffinePath(schedule).interpolate(eps, x1, t)
    value = from_data_and_noise(schedule, source, x1, eps, t)
    made = convert(schedule, source, target, value, x, t)
    scale = 1 + float(jnp.abs(value).max())
    expected = from_data_and_noise(schedule, target, x1, eps, t)
    np.testing.assert_allclose(made, expected, rtol=1e-8, atol=1e-9 * scale)
    for a, b in zip(data_and_noise(schedule, source, value, x, t), (x1, eps)):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_ends_are_finite_or_refused(schedule, dtype):
    """Every conversion at both ends: a finite number, or one line that says why there is none."""
    x, value = jax.random.normal(jax.random.key(0), (2, 2, 3), dtype)
    defined = []
    for source, target, end in itertools.product(KINDS, KINDS, (0.0, 1.0)):
        if end in undefined(schedule, source, target):
            with pytest.raises(ValueError, match=f"{source} does not determine {target} at t = {end:g}"):
                convert(schedule, source, target, value, x, jnp.full(2, end))
        else:
            defined.append((source, target, end))

    @jax.jit
    def made(value, x, ends):
        return [convert(schedule, source, target, value, x, ends[end]) for source, target, end in defined]

    ends = {end: jnp.full(2, end, jnp.promote_types(dtype, jnp.float32)) for end in (0.0, 1.0)}
    for case, result in zip(defined, jax.device_get(made(value, x, ends))):
        assert np.isfinite(result.astype(np.float64)).all(), case


def test_what_is_undefined_really_is(schedule):
    """Nothing is refused for convenience: the refused formulas blow up as t approaches the end."""
    x, value = jax.random.normal(jax.random.key(0), (2, 1, 2))
    cases = [(a, b, end) for a, b in itertools.product(KINDS, KINDS) for end in undefined(schedule, a, b)]

    @jax.jit
    def size(distance):
        return [
            jnp.abs(convert(schedule, a, b, value, x, jnp.abs(end - distance))).max() for a, b, end in cases
        ]

    for case, near, nearer in zip(cases, size(jnp.full(1, 1e-4)), size(jnp.full(1, 1e-8))):
        assert nearer > 50 * near, case


def test_time_per_token():
    schedule = ALL[0]
    x, value = jax.random.normal(jax.random.key(0), (2, 2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 10).reshape(2, 5)
    made = convert(schedule, "velocity", "x1", value, x, t)
    np.testing.assert_allclose(made, x + (1 - t[..., None]) * value)
