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
    """Every conversion of an exact prediction is exact, in float64."""
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


@functools.cache
def conversions(schedule):
    """All conversions of a schedule in one program: {(source, target): made}."""

    @jax.jit
    def run(value, x, t):
        return {(a, b): convert(schedule, a, b, value, x, t) for a in KINDS for b in KINDS}

    return run


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ALL),
    st.sampled_from(["float64", "bfloat16"]),
    st.one_of(st.sampled_from([0.0, 1.0, 5e-324, 1e-9, 1 - 2**-53]), st.floats(0, 1)),
    st.integers(0, 99),
)
def test_finite_or_refused(schedule, dtype, t, seed):
    """Every conversion at every t, both ends included: a finite number, or one line that says why there is none."""
    x, value = (y.astype(dtype) for y in normals(seed, 2, (2, 3)))
    times = jnp.full(2, t, jnp.promote_types(dtype, jnp.float32))
    at = float(times[0])
    for (source, target), made in jax.device_get(conversions(schedule)(value, x, times)).items():
        ends = undefined(schedule, source, target)
        if at in ends:
            with pytest.raises(ValueError, match=f"{source} does not determine {target} at t = {at:g}"):
                convert(schedule, source, target, value, x, times)
        elif all(abs(at - end) > 1e-4 for end in ends):  # nearer, the answer may be beyond any float
            assert np.isfinite(made.astype(np.float64)).all(), (source, target)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_both_ends(schedule, end):
    """The ends themselves, which a random search might miss, and times of mixed kind."""
    for dtype in ("float64", "bfloat16"):
        test_finite_or_refused.hypothesis.inner_test(schedule, dtype, end, 0)
    x, value = normals(0, 2, (2, 3))
    with pytest.raises(ValueError, match="x1 does not determine eps at t = 1"):
        convert(schedule, "x1", "eps", value, x, jnp.array([0.5, 1.0]))


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
