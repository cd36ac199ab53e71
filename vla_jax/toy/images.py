"""Small pictures to generate: drawn shapes, which need no download, and CIFAR-10 for those who have its files.

Images are float32 [b 32 32 3] in [-1, 1] with integer labels [b].
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from vla_jax.flow.metrics import energy_distance

SHAPES = ("disc", "square", "triangle", "cross")
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image in CIFAR-10's binary version: the label, then red, green, blue planes of 32 rows of 32."""


class Images(NamedTuple):
    """A batch of pictures."""

    x: Float[Array, "b 32 32 3"]
    label: Int[Array, " b"]


class Cifar10(NamedTuple):
    """The data set in memory."""

    images: UInt8[np.ndarray, "n 32 32 3"]
    labels: Int[np.ndarray, " n"]

    def batch(self, rng: np.random.Generator, n: int) -> Images:
        """`n` random images, half of them mirrored."""
        pick = rng.integers(len(self.images), size=n)
        x = self.images[pick]
        x = np.where(rng.random(n)[:, None, None, None] < 0.5, x[:, :, ::-1], x)
        return Images(jnp.asarray(x, jnp.float32) / 127.5 - 1, jnp.asarray(self.labels[pick]))


def read_cifar10(folder: Path) -> Cifar10:
    """The training images of cifar-10-binary.tar.gz, unpacked: data_batch_1.bin … data_batch_5.bin, as found.

    The binary version of https://www.cs.toronto.edu/~kriz/cifar.html: no pickles, which can run code.
    """
    files = sorted(Path(folder).glob("data_batch_*.bin"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no data_batch_*.bin; unpack the binary version of CIFAR-10 (cifar-10-binary.tar.gz) there"
        )
    parts = []
    for file in files:
        raw = np.fromfile(file, np.uint8)
        if not raw.size or raw.size % RECORD:
            raise ValueError(
                f"{file} has {raw.size} bytes, not a multiple of {RECORD}; is it the binary version?"
            )
        parts.append(raw.reshape(-1, RECORD))
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(CIFAR_CLASSES):
        raise ValueError(f"{folder} has label {labels.max()}; CIFAR-10's are 0 to 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Cifar10(np.ascontiguousarray(images), labels)


def draw_shapes(key: Key[Array, ""], n: int) -> Images:
    """`n` shapes of random kind, size, place and colour on a darker ground, with soft edges of a pixel."""
    for_label, for_place, for_size, for_colour, for_ground = jax.random.split(key, 5)
    label = jax.random.randint(for_label, (n,), 0, len(SHAPES))
    centre = jax.random.uniform(for_place, (n, 1, 1, 2), minval=11.0, maxval=21.0)
    size = jax.random.uniform(for_size, (n, 1, 1), minval=5.0, maxval=9.0)
    line = jnp.arange(32) + 0.5
    u, v = jnp.moveaxis(jnp.stack(jnp.meshgrid(line, line), axis=-1) - centre, -1, 0)  # right, down
    far = jnp.maximum(jnp.abs(u), jnp.abs(v))
    distance = jnp.stack(
        [
            jnp.hypot(u, v) - size,
            far - 0.9 * size,
            jnp.maximum(v - 0.6 * size, 0.866 * jnp.abs(u) - 0.5 * v - 0.6 * size),
            jnp.maximum(far - size, jnp.minimum(jnp.abs(u), jnp.abs(v)) - 0.35 * size),
        ]
    )  # how far outside: disc, square, triangle, cross
    outside = jnp.take_along_axis(distance, label[None, :, None, None], axis=0)[0]
    cover = jnp.clip(0.5 - outside, 0, 1)[..., None]
    colour = jax.random.uniform(for_colour, (n, 1, 1, 3), minval=0.0, maxval=1.0)
    ground = jax.random.uniform(for_ground, (n, 1, 1, 3), minval=-1.0, maxval=-0.4)
    return Images(ground + cover * (colour - ground), label)


def features(x: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
    """64 fixed random filters of 5 x 5 at full and half size: mean, and mean square, of their positive part."""
    filters = jax.random.normal(jax.random.key(17), (5, 5, x.shape[-1], 64)) / (25 * x.shape[-1]) ** 0.5
    parts = []
    for scale in (1, 2):
        small = x.reshape(x.shape[0], x.shape[1] // scale, scale, x.shape[2] // scale, scale, -1).mean((2, 4))
        h = jax.nn.relu(
            jax.lax.conv_general_dilated(
                small, filters, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        parts += [h.mean((1, 2)), jnp.square(h).mean((1, 2))]
    return jnp.concatenate(parts, axis=1)


@jax.jit
def feature_distance(x: Float[Array, "n h w c"], y: Float[Array, "m h w c"]) -> Float[Array, ""]:
    """Energy distance of `features`, in units of their spread in `y`: 0 in the mean for one law. Not an FID."""
    f, g = features(x), features(y)
    centre = g.mean(0)
    spread = jnp.maximum(
        g.std(0), 2.0**-16 * jnp.abs(g).max(0)
    )  # of a feature that never changes: its rounding
    spread = jnp.where(spread > 0, spread, 1)
    return energy_distance((f - centre) / spread, (g - centre) / spread) / f.shape[1] ** 0.5
