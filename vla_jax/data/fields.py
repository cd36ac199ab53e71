"""What one field of an observation must be: the rules of every door, `Policy.act`'s as the server's.

| field | taken | refused |
|---|---|---|
| image | uint8 RGB, channels last, values 0 to 255, any height and width | floats, bool, grey, RGBA, channels first |
| state | real numbers in the robot's units, cast to float32 | NaN, infinity, bool, another number of dims |
| text | a string (an instruction may be empty) | bytes, lists, what UTF-8 cannot hold |

Only what has one meaning is converted: the width of a number and whose array it is (NumPy, JAX). Whether floats mean
[0, 1], [-1, 1] or [0, 255] is for whoever made them to say.

A refusal is one ValueError: the field, what came, what is expected, how to mend it. Needs numpy only: robots check
what they send by the same rules.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


def check_image(
    field: str, value: Any, *, robots: int | None = None, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "*b h w 3"]:
    """One camera's images [robots h w 3], or of one robot [h w 3] where `robots` is None.

    `size`: the only (height, width) that is taken; None: any, to be resized as in training. Raises ValueError.
    """
    batch = () if robots is None else (robots,)
    height, width = size or ("h", "w")
    wanted = f"uint8{_shape((*batch, height, width, 3))} is expected (RGB, channels last, values 0 to 255)"
    image = _array(value)
    if image is None or not (
        image.dtype == np.uint8
        and image.ndim == len(batch) + 3
        and image.shape[: len(batch)] == batch
        and image.shape[-1] == 3
        and image.size > 0
    ):
        raise ValueError(f"{field} is {kind(value)}; {wanted}{_mend_image(image, batch)}")
    if size is not None and image.shape[-3:-1] != tuple(size):
        raise ValueError(f"{field} is {kind(value)}; {wanted}: resize it")
    return image


def check_state(
    field: str, value: Any, dims: int | None, *, robots: int | None = None
) -> Float[np.ndarray, "*b q"]:
    """Proprioception as float32 [robots q], or [q] where `robots` is None; `dims` None: any q. Raises ValueError."""
    batch = () if robots is None else (robots,)
    wanted = f"float32{_shape((*batch, 'q' if dims is None else dims))} is expected"
    state = _array(value)
    if state is None or state.dtype.kind not in "fiu":
        mend = "" if state is None else ": cast it with .astype(np.float32)"
        raise ValueError(f"{field} is {kind(value)}; {wanted}{mend}")
    if (
        state.ndim != len(batch) + 1
        or state.shape[:-1] != batch
        or state.shape[-1] != (dims or state.shape[-1])
    ):
        alone = batch == (1,) and state.ndim == 1
        mend = ": add the axis of robots, state[None]" if alone else ""
        raise ValueError(f"{field} is {kind(value)}; {wanted}{mend}")
    with np.errstate(over="ignore"):
        cast = state.astype(np.float32)
    if not np.isfinite(cast).all():
        place = np.argwhere(~np.isfinite(cast))[0].tolist()
        what = f"{field}{place} is {state[tuple(place)]}"
        raise ValueError(f"{what}; finite numbers are expected: send a state only while every sensor reports")
    return cast


def check_text(field: str, value: Any, *, longest: int | None = None, empty: bool = True) -> str:
    """A text of at most `longest` characters. Raises ValueError."""
    least = 0 if empty else 1
    if not isinstance(value, str) or not least <= len(value) <= (longest or len(value)):
        limits = "" if longest is None else f" of {least} to {longest} characters"
        mend = ": decode the bytes, .decode()" if isinstance(value, bytes) else ""
        raise ValueError(f"{field} is {kind(value)}; a text{limits} is expected{mend}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} holds {value[error.start : error.end]!r}, which UTF-8 cannot hold; a text is expected: "
            "read it with its own encoding"
        ) from None
    return str(value)


def kind(value: Any) -> str:
    """What came, in a few words."""
    array = _array(value)
    if array is not None:
        return f"{array.dtype}{_shape(array.shape)}"
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    names = {type(None): "None", dict: "a map", list: "a list", tuple: "a tuple", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def _array(value: Any) -> np.ndarray | None:
    """An array of NumPy or of another library (JAX, torch on the CPU) as NumPy's; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    known = hasattr(value, "__array__") and hasattr(value, "shape") and not isinstance(value, np.generic)
    return np.asarray(value) if known else None


def _shape(shape: tuple) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _mend_image(image: np.ndarray | None, batch: tuple[int, ...]) -> str:
    """How to make what is expected of what came, where that can be told from its type and shape."""
    if image is None:
        return ""
    if image.dtype.kind == "f":
        return ": floats in [0, 1] become it by np.round(255 * image).astype(np.uint8)"
    if image.dtype == bool:
        return ": a mask becomes it by 255 * image.astype(np.uint8), and three channels"
    if image.dtype != np.uint8:
        return ": if its values are 0 to 255, cast it with .astype(np.uint8)"
    shape, rank = image.shape, len(batch) + 3
    if image.ndim == rank and shape[-1] not in (1, 3, 4) and shape[-3] == 3:
        return ": move the channels last, np.moveaxis(image, -3, -1)"
    if image.ndim == rank and shape[-1] == 4:
        return ": leave the fourth channel out, image[..., :3]"
    if image.ndim == rank and shape[-1] == 1:
        return ": repeat the grey channel, np.repeat(image, 3, axis=-1)"
    if batch and image.ndim == 3 and shape[-1] == 3:
        return ": add the axis of robots, image[None]"
    if image.ndim == rank - 1:
        return ": a grey image gets three channels by np.repeat(image[..., None], 3, axis=-1)"
    if batch and shape[:1] != batch:
        return f": one image for each of the {batch[0]} instructions"
    return ""
