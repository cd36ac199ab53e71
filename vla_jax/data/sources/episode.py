"""One recorded episode in memory: states and actions as arrays, images still as PNG."""

import dataclasses
import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """An episode whose images are still PNG; `frame` decodes one."""

    number: int
    """Its place in the data set."""
    state: Float[np.ndarray, "T q"]
    action: Float[np.ndarray, "T a"]
    png: dict[str, tuple[bytes, ...]]
    """Camera → one PNG per step."""
    language_instruction: str
    text_target: tuple[str, ...]
    """The text to be learned, one per step."""
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.state)

    def frame(self, camera: str, step: int) -> UInt8[np.ndarray, "h w 3"]:
        """One camera's image at one step."""
        try:
            return np.asarray(Image.open(io.BytesIO(self.png[camera][step])))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"episode {self.number} step {step}: the image of camera {camera} cannot be decoded ({error})"
            ) from None

    @property
    def nbytes(self) -> int:
        """Memory of its content."""
        images = sum(len(image) for frames in self.png.values() for image in frames)
        return images + self.state.nbytes + self.action.nbytes
