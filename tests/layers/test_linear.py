"""Products with LoRA's factors beside the matrix: what is small is not rounded away, in whatever way it is called."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from vla_jax.layers.int8 import quantize
from vla_jax.layers.linear import Matrix, low_rank_equations, multiply

CASES = {  # the model's own: x, w, and the axes of A and B
    "btd,nde->btne": ((8, 3, 16), (4, 16, 6), (16, 2), (2, 4, 6)),
    "btd,cmde->btcme": ((8, 3, 16), (2, 3, 16, 6), (2, 16, 2), (2, 2, 3, 6)),
    "btd,cdf->btcf": ((8, 3, 16), (2, 16, 7), (2, 16, 2), (2, 2, 7)),
    "btne,ned->btd": ((8, 3, 4, 6), (4, 6, 10), (4, 6, 2), (2, 10)),
    "...d,df->...f": ((8, 3, 16), (16, 7), (16, 2), (2, 7)),
}


def random(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def case(equation, dtype, *, small):
    """A matrix that is exact in bfloat16, as converted weights are, and a B as small as after a step at 2.5e-5."""
    x, w, a, b = CASES[equation]
    w = random(1, w) * 0.05
    a = random(2, a) / 4
    b = random(3, b) * (2.5e-5 if small else 1.0)
    return random(0, x, dtype), Matrix(w.astype(jnp.bfloat16), a, b)


def exact(equation, x, matrix):
    """x·W and (x·A)·B in float64."""
    x, w, a, b = (np.asarray(leaf, np.float64) for leaf in (x, matrix.w, matrix.a, matrix.b))
    narrow, widen = low_rank_equations(equation, a.ndim)
    return np.einsum(equation, x, w), np.einsum(widen, np.einsum(narrow, x, a), b)


class Products(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    @parameterized.parameters(*CASES)
    def test_every_product_of_the_model(self, equation):
        x, matrix = case(equation, jnp.float32, small=False)
        found = self.variant(lambda x, matrix: multiply(equation, x, matrix))(x, matrix)
        chex.assert_trees_all_close(found, sum(exact(equation, x, matrix)), rtol=1e-5, atol=1e-5)

    @parameterized.parameters(*CASES)
    def test_bfloat16_rounds_once(self, equation):
        """To the nearest of 8 bits of the whole sum, beside what bfloat16 does to A, B and x·A."""
        x, matrix = case(equation, jnp.bfloat16, small=False)
        base, added = exact(equation, x, matrix)
        found = np.asarray(multiply(equation, x, matrix), np.float64)
        assert found.shape == base.shape
        error = np.abs(found - base - added)
        assert error.max() < 2**-8 * np.abs(base + added).max() + 0.02 * np.abs(added).max()

    def test_derivatives_forward_and_backward(self):
        """Forward mode too, which MeanFlow needs; W has none where it is not asked for."""
        x, matrix = case("btd,nde->btne", jnp.float32, small=False)

        def f(x, a, b):
            return multiply("btd,nde->btne", x, Matrix(matrix.w, a, b))

        primals = (x, matrix.a, matrix.b)
        moved = tuple(random(i, p.shape) for i, p in enumerate(primals, 7))
        _, forward = jax.jvp(f, primals, moved)
        _, pull = jax.vjp(f, *primals)
        ones = random(11, forward.shape)
        backward = sum(jnp.vdot(g, m) for g, m in zip(pull(ones), moved))
        chex.assert_trees_all_close(jnp.vdot(ones, forward), backward, rtol=1e-4)
        h = 1e-2
        plus, minus = (f(*(p + s * h * m for p, m in zip(primals, moved))) for s in (1, -1))
        chex.assert_trees_all_close(forward, (plus - minus) / (2 * h), rtol=1e-2, atol=1e-2)

    def test_mapped_over_cells(self):
        x, matrix = case("...d,df->...f", jnp.bfloat16, small=False)
        cells = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), matrix)
        found = jax.vmap(lambda m: multiply("...d,df->...f", x, m))(cells)
        chex.assert_trees_all_equal(found[0], multiply("...d,df->...f", x, matrix))


def test_a_small_correction_survives_bfloat16():
    """What A·B adds to the product, over many rows: all of it, and without a bias, where a merged sum keeps half."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20_000, 64)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.bfloat16)
    a = jnp.asarray(rng.normal(size=(64, 16)) / 8, jnp.float32)
    for size, merged_loses in ((2.5e-5, 0.9), (20 * 2.5e-5, 0.5)):
        b = jnp.asarray(size * np.sign(rng.normal(size=(16, 64))), jnp.float32)
        exactly = np.asarray(x, np.float64) @ np.asarray(a, np.float64) @ np.asarray(b, np.float64)

        def kept(y, base):
            """How much of the effect is in y - base; rounding beside it averages out."""
            effect = np.asarray(y, np.float64) - np.asarray(base, np.float64)
            return np.sum(effect * exactly) / np.sum(exactly**2)

        plain = multiply("nd,df->nf", x, Matrix(w))
        assert abs(kept(multiply("nd,df->nf", x, Matrix(w, a, b)), plain) - 1) < 0.02
        merged = (w.astype(jnp.float32) + a @ b).astype(jnp.bfloat16)
        rounded = (merged.astype(jnp.float32) - w.astype(jnp.float32)) - a @ b
        assert np.linalg.norm(rounded) > merged_loses * np.linalg.norm(a @ b)


@pytest.mark.parametrize("kept", ["plain", "int8", "lora", "int8 with lora"])
@pytest.mark.parametrize("equation", CASES)
def test_a_matrix_with_its_inputs_first_is_the_same(equation, kept):
    """As served parameters are kept: in another order of axes, whatever lies beside them."""
    x, matrix = case(equation, jnp.float32, small=False)
    _, letters, result = equation.replace("->", ",").split(",")
    into = [i for i, letter in enumerate(letters) if letter not in result]
    scale = None
    if "int8" in kept:
        w, scale = quantize(matrix.w, into)
        matrix = dataclasses.replace(matrix, w=w)
    matrix = dataclasses.replace(matrix, scale=scale) if "lora" in kept else Matrix(matrix.w, scale=scale)
    order = into + [i for i in range(matrix.w.ndim) if i not in into]
    turned = dataclasses.replace(matrix, w=jnp.transpose(matrix.w, order), turned=True)
    np.testing.assert_allclose(
        multiply(equation, x, turned), multiply(equation, x, matrix), rtol=1e-5, atol=1e-5
    )
