"""Images, state and actions on the device, equal to what `vla_jax.data.transforms` does on the host.

Resizing repeats Pillow's 8-bit bilinear resampling to the bit: its weights are rounded to 22 binary places and summed
as integers, first along rows, then along columns, each result rounded to uint8 (Pillow, `Resample.c`).
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vla_jax.data.bundle import DataBundle
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.normalize import Normalize
from vla_jax.data.resize import offsets, scaled_size
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.transforms import PadDims, ResizeImages, SelectCameras, Tokenize

_BITS = 22
"""Pillow's binary places: 32 less 8 of the pixel and 2 to spare."""
ORDER = (SelectCameras, ResizeImages, Normalize, Tokenize, PadDims)
"""The transforms that have a compiled form, in order. Older checkpoints have the last two the other way round, which
is the same where the prompt does not tell the state; action tokens are of training alone, and what turns a robot's
units into the model's is some numbers per call, done on the host."""
ELSEWHERE = (TokenizeActions, RobotUnits)


class Taps(NamedTuple):
    """For each output pixel along one axis: the inputs it is made of, and their weights in units of 2^-22."""

    index: Int[np.ndarray, "out taps"]
    weight: Int[np.ndarray, "out taps"]


def taps(size: int, out: int) -> Taps:
    """Pillow's bilinear (triangle) filter from `size` to `out` pixels; wider than one pixel where it shrinks."""
    scale = size / out
    support = max(scale, 1.0)
    count = math.ceil(support) * 2 + 1
    index, weight = np.zeros((out, count), np.int32), np.zeros((out, count), np.int32)
    for pixel in range(out):
        centre = (pixel + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), size)
        raw = np.maximum(1.0 - np.abs((np.arange(low, high) - centre + 0.5) / support), 0.0)
        raw = raw / raw.sum()
        index[pixel] = np.clip(low + np.arange(count), 0, size - 1)
        weight[pixel, : high - low] = (0.5 + raw * 2**_BITS).astype(np.int32)
    return Taps(index, weight)


def resize_with_pad(images: UInt8[Array, "b h w 3"], to: ResizeImages) -> UInt8[Array, "b height width 3"]:
    """`ResizeImages.resize`: scaled into the size keeping the proportions, on black."""
    h, w = images.shape[1:3]
    if (h, w) == (to.height, to.width):
        return images
    new_h, new_w = scaled_size(h, w, to.height, to.width, to.fit)
    if new_w != w:
        images = _resample(images, taps(w, new_w), axis=2)
    if new_h != h:
        images = _resample(images, taps(h, new_h), axis=1)
    top, left = offsets(new_h, new_w, to.height, to.width)
    around = ((0, 0), (top, to.height - new_h - top), (left, to.width - new_w - left), (0, 0))
    return jnp.pad(images, around)


def _resample(images: UInt8[Array, "b h w 3"], by: Taps, axis: int) -> UInt8[Array, "b h2 w2 3"]:
    """Integer sums along one axis, rounded to uint8."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    total = 1 << (_BITS - 1)
    for tap in range(by.index.shape[1]):
        picked = jnp.take(images, by.index[:, tap], axis=axis).astype(jnp.int32)
        total = total + picked * by.weight[:, tap].reshape(shape)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


class Affine(NamedTuple):
    """x → (x - offset) · factor by group, with the offset in two float32 so that large ones cost no digits."""

    offset: Float[np.ndarray, "group dims"]
    rest: Float[np.ndarray, "group dims"]
    factor: Float[np.ndarray, "group dims"]


class Scaling(NamedTuple):
    """Of states towards the network and of actions back, both in the model's units, not the robot's where these differ.

    The groups are the statistics' keys in order.
    """

    groups: tuple[str, ...]
    state: Affine
    action: Affine
    known: Affine
    """Of actions towards the model."""
    resize: ResizeImages
    """Scales images of any size into the model's, with their proportions kept."""


def scaling_of(bundle: DataBundle) -> Scaling:
    """The arithmetic of a bundle's normalisation. Raises ValueError where its transforms are not those of `ORDER`."""
    kinds = tuple(type(t) for t in bundle.transforms if not isinstance(t, ELSEWHERE))
    older = (*ORDER[:3], PadDims, Tokenize)
    if kinds != ORDER and (kinds != older or tokenize_of(bundle).prompt.uses_state):
        raise ValueError(
            f"the policy's transforms are {', '.join(kind.__name__ for kind in kinds)}; only "
            f"{', '.join(kind.__name__ for kind in ORDER)} can be compiled, use the policy as it is"
        )
    normalize = bundle.normalize
    resize = next(t for t in bundle.transforms if isinstance(t, ResizeImages))
    groups = tuple(sorted(normalize.statistics))
    state = [normalize.affine(group, "state") for group in groups]
    action = [normalize.affine(group, "action") for group in groups]
    return Scaling(
        groups=groups,
        state=_affine([offset for offset, _, _ in state], [inverse for _, _, inverse in state]),
        action=_affine([offset for offset, _, _ in action], [scale for _, scale, _ in action]),
        known=_affine([offset for offset, _, _ in action], [inverse for _, _, inverse in action]),
        resize=resize,
    )


def tokenize_of(bundle: DataBundle) -> Tokenize:
    """The transform that makes tokens of texts."""
    return next(transform for transform in bundle.transforms if isinstance(transform, Tokenize))


def normalize_state(by: Affine, group: Int[Array, " b"], state: Float[Array, "b q"]) -> Float[Array, "b q"]:
    """(x - offset) · 1/scale."""
    offset, rest, factor = (jnp.asarray(array)[group] for array in by)
    return ((state - offset) - rest) * factor


def model_actions(
    by: Affine, group: Int[Array, " b"], actions: Float[Array, "b k a"]
) -> Float[Array, "b k a"]:
    """(x - offset) · 1/scale."""
    offset, rest, factor = (jnp.asarray(array)[group][:, None] for array in by)
    return ((actions - offset) - rest) * factor


def robot_actions(
    by: Affine, group: Int[Array, " b"], actions: Float[Array, "b S k model_a"]
) -> Float[Array, "b S k a"]:
    """Padded dimensions cut off, then x · scale + offset."""
    offset, rest, factor = (jnp.asarray(array)[group][:, None, None] for array in by)
    return (actions[..., : factor.shape[-1]] * factor + rest) + offset


def _affine(offsets: list[Any], factors: list[Any]) -> Affine:
    whole = np.asarray(offsets, np.float64)
    offset = whole.astype(np.float32)
    return Affine(offset, (whole - offset).astype(np.float32), np.asarray(factors, np.float32))
