"""Images to the model's size, keeping their proportions, on black: the same whatever Pillow's version.

Rounding between the two axes makes their order matter by one of 255 levels, and versions of Pillow differ in it. So
each axis is a call of its own: width first, then height.
"""

from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Fit = Literal["exact", "openpi"]
"""How the scaled size is rounded. exact: the side that fills its axis fills it wholly, the other one is cut to whole
pixels. openpi: as its `resize_with_pad` computes in floating point, by which either side may come out a pixel
smaller (9 % of all sizes)."""


def scaled_size(h: int, w: int, height: int, width: int, fit: Fit) -> tuple[int, int]:
    """(height, width) of an [h, w] image inside of [height, width], at least one pixel each."""
    if fit == "openpi":
        ratio = max(w / width, h / height)
        size = int(h / ratio), int(w / ratio)
    elif h * width >= w * height:  # whole numbers: no rounding makes the longer side a pixel short
        size = height, w * height // h
    else:
        size = h * width // w, width
    return max(1, size[0]), max(1, size[1])


def offsets(new_h: int, new_w: int, height: int, width: int) -> tuple[int, int]:
    """(top, left) of the scaled image: in the middle, of an odd number of black pixels one more behind it."""
    return (height - new_h) // 2, (width - new_w) // 2


def resize_with_pad(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int, fit: Fit
) -> UInt8[np.ndarray, "height width 3"]:
    """Bilinear, with Pillow's filter that covers more than one pixel where it shrinks."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    new_h, new_w = scaled_size(h, w, height, width, fit)
    scaled = Image.fromarray(image).resize((new_w, h), Image.Resampling.BILINEAR)
    scaled = scaled.resize((new_w, new_h), Image.Resampling.BILINEAR)
    result = np.zeros((height, width, 3), np.uint8)
    top, left = offsets(new_h, new_w, height, width)
    result[top : top + new_h, left : left + new_w] = np.asarray(scaled)
    return result
