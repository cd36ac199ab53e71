"""What robots see, as rows of the compiled program: all that is still done on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vla_jax.data.bundle import DataBundle
from vla_jax.data.sample import Sample
from vla_jax.data.tokenizer import TextTokens
from vla_jax.serve.compiled.preprocess import scaling_of, tokenize_of
from vla_jax.serve.compiled.prompts import null
from vla_jax.types import Observation


class Encoded(NamedTuple):
    """One robot's observation, ready to be stacked."""

    images: dict[str, np.ndarray]
    """The model's cameras that have an image, in the model's order."""
    state: np.ndarray
    """[q], in the robot's units."""
    group: int
    """Which row of the normalisation's statistics holds for it (by task, where they are kept apart)."""
    text: TextTokens


class ObservationEncoder:
    """Checks an observation and tokenises its texts."""

    def __init__(self, bundle: DataBundle, *, resize: bool = False):
        """`resize`: images are scaled to the model's size here."""
        self._bundle, self._tokenize, self._resize = bundle, tokenize_of(bundle), resize
        self._groups = scaling_of(bundle).groups

    def __call__(
        self, observation: Observation, plan: Sequence[str] | None, *, null_prompt: bool
    ) -> list[Encoded]:
        """One row per robot, with `null_prompt` without its instruction. Raises ValueError."""
        observation, rows = self._bundle.check(observation), []
        for row, instruction in enumerate(observation.instruction):
            images = self._images(observation, row)
            state = observation.state[row]
            target = None if plan is None else plan[row]
            sample = Sample(images=images, state=state, instruction=instruction, text_target=target)
            group = self._groups.index(self._bundle.normalize.key(sample))
            rows.append(Encoded(images, state, group, self._text(sample, null_prompt)))
        return rows

    def _images(self, observation: Observation, row: int) -> dict[str, np.ndarray]:
        select, images = self._bundle.select, {}
        for name in self._bundle.shown:
            source = self._bundle.sources.get(name)
            frames = None if source is None else observation.images.get(source)
            if frames is not None:
                images[name] = frames[row]
            elif name in select.black:
                images[name] = select.blank(name)
        if self._resize:
            images = {name: self._bundle.resize.resize(image) for name, image in images.items()}
        return images

    def _text(self, sample: Sample, null_prompt: bool) -> TextTokens:
        """Tokens of prompt and plan; the prompt may tell the normalised state."""
        if self._tokenize.prompt.uses_state:
            state = self._bundle.model_state(sample.state)
            sample = self._bundle.normalize.inputs(sample.replace(state=state))
        text = self._tokenize.inputs(sample).text
        if text is None:
            raise ValueError("the policy's transforms wrote no text, which its programs read")
        return null(text) if null_prompt else text
