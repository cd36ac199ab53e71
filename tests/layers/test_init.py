"""The patch embedding's first values."""

import jax
import numpy as np
import pytest

from vla_jax.layers import init


@pytest.mark.parametrize("side, width", [(8, 48), (4, 48), (2, 16)])
def test_patch_embedding_starts_as_low_frequencies(side, width):
    kernel = np.asarray(init.dct_2d((None,) * 4)(jax.random.key(0), (side, side, 3, width)).value)
    assert kernel.shape == (side, side, 3, width)
    inputs = side * side * 3
    filters = kernel.reshape(inputs, width)[:, : min(width, inputs)]
    # Orthogonal, and of one length: nothing of a picture is seen twice.
    np.testing.assert_allclose(filters.T @ filters, width / inputs * np.eye(filters.shape[1]), atol=1e-6)
    # The first ones are the channels' means: what a picture of one colour gives, and nothing else gives.
    colour = np.broadcast_to([0.5, -0.2, 0.1], (side, side, 3)).reshape(-1)
    out = colour @ filters
    np.testing.assert_allclose(
        out[:3], np.array([0.5, -0.2, 0.1]) * side * (width / inputs) ** 0.5, rtol=1e-5
    )
    np.testing.assert_allclose(out[3:], 0, atol=1e-6)
    if width > inputs:
        assert kernel.reshape(inputs, width)[:, inputs:].std() == pytest.approx(inputs**-0.5, rel=0.4)
