"""Conversions: round trips, and at the ends a finite number or a plain refusal."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flow.conftest import ALL, normals
from vla_jax.flow.paths import AffinePath
from vla_jax.flow.predictions import Kind, convert, data_and_noise, from_data_and_noise, undefined

KINDS = get_args(Kind)


@functools.cache
def everything(schedule):
    """All conversions of a schedule at once, compiled once: truth, {(source, target): made}, {source: pair}."""

    @jax.jit
    def run(x1, eps, t):
        x = AffinePath(schedule).interpolate(eps, x1, t)
        truth = {kind: from_data_and_noise(schedule, kind, x1, eps, t) for kind in KINDS}
        made = {(a, b): convert(schedule, a, b, truth[a], x, t) for a in KINDS for b in KINDS}
        return truth, made, {kind: data_and_noise(schedule, kind, truth[kind], x, t) for kind in KINDS}

    return run


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ALL), st.floats(0.01, 0.99), st.integers(0, 99))
def test_round_trips(schedule, t, seed):
    """A2, C13: every conversion of an exact prediction is exact, in float64."""
    x1, eps = normals(seed, 2, (2, 3))
    truth, made, pairs = jax.device_get(everything(schedule)(x1, eps, jnp.full(2, t)))
    for (source, target), value in made.items():
        scale = 1 + np.abs(truth[source]).max()
        np.testing.assert_allclose(
            value, truth[target], rtol=1e-8, atol=1e-9 * scale, err_msg=f"{source} -> {target}"
        )
    for source, pair in pairs.items():
        for a, b in zip(pair, (x1, eps)):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * (1 + np.abs(truth[source]).max()))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_ends_are_finite_or_refused(schedule, dtype):
    """Every conversion at both ends: a finite number, or one line that says why there is none."""
    x, value = (y.astype(dtype) for y in normals(0, 2, (2, 3)))
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
    x, value = normals(0, 2, (1, 2))
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
    x, value = normals(0, 2, (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 10).reshape(2, 5)
    made = convert(schedule, "velocity", "x1", value, x, t)
    np.testing.assert_allclose(made, x + (1 - t[..., None]) * value)
