"""Image augmentation against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.data.augment import AugmentConfig, augment, augment_images
from vla_jax.types import Batch

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)


def shifted(image: np.ndarray, y: int, x: int, pad: int) -> np.ndarray:
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    return padded[pad + y : pad + y + 12, pad + x : pad + x + 12]


def test_shifts_repeat_the_border_and_differ_by_sample():
    out = np.asarray(augment_images(jax.random.key(1), jnp.asarray(IMAGES), AugmentConfig(shift=2)))
    offsets = []
    for image, got in zip(IMAGES, out):
        found = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if (shifted(image, y, x, 2) == got).all()]
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 1


def test_contrast_and_brightness_stay_in_bounds():
    config = AugmentConfig(brightness=0.1, contrast=0.3)
    out = np.asarray(augment_images(jax.random.key(1), jnp.asarray(IMAGES), config)).astype(float)
    for image, got in zip(IMAGES.astype(float), out):
        # Inside the clipping range, the result is a line through the image: slope 1 ± 0.3.
        inner = (got > 0) & (got < 255)
        slope, _ = np.polyfit(image[inner], got[inner], 1)
        assert 0.69 < slope < 1.31
        assert abs(got.mean() - image.mean()) < 0.1 * 255 + 5


def test_cameras_vary_on_their_own_and_nothing_is_the_identity():
    flags = jnp.ones((6, 1), bool)
    batch = Batch(
        images={"a": jnp.asarray(IMAGES), "b": jnp.asarray(IMAGES)},
        image_mask={"a": flags[:, 0], "b": flags[:, 0]},
        state=jnp.zeros((6, 1)),
        tokens=jnp.zeros((6, 1), jnp.int32),
        token_mask=flags,
        token_causal=flags,
        token_loss=flags,
    )
    out = augment(jax.random.key(0), batch, AugmentConfig(shift=2))
    assert (out.images["a"] != out.images["b"]).any()
    assert augment(jax.random.key(0), batch, AugmentConfig()) is batch


@pytest.mark.parametrize("change", [{"shift": -1}, {"brightness": 1.0}, {"contrast": -0.1}])
def test_impossible_values(change):
    with pytest.raises(ValueError, match=f"augment.{next(iter(change))}"):
        AugmentConfig(**change)
