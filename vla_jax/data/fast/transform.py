"""A sample's chunk as FAST tokens: one step of the way from sample to model."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.ids import ActionIds
from vla_jax.data.sample import ActionTokens, Sample


class DecodedChunks(NamedTuple):
    """Normalised chunks of the robot's own dimensions, and which rows were no chunk."""

    actions: Float[np.ndarray, "*n k a"]
    malformed: Bool[np.ndarray, "*n"]


@dataclasses.dataclass(frozen=True)
class TokenizeActions:
    """Normalised actions, not yet padded, to tokens. Steps behind an episode's end count: FAST knows whole chunks."""

    fast: FastTokenizer
    ids: ActionIds
    horizon: int
    action_dim: int
    """The robot's own dimensions, without padding."""
    max_tokens: int
    """Length of a row, begin and end included."""
    keep_actions: bool
    """Whether the continuous actions stay beside the tokens (for an expert) or go (the tokens are the policy)."""
    limit: int = 0
    """Tokens after which a sampled chunk is cut, where the data are not known. 0: four times `longest`."""

    def inputs(self, sample: Sample) -> Sample:
        """Sets `action_tokens`. Raises ValueError where they do not fit."""
        if sample.actions is None:
            return sample
        row = self.ids.of(self.fast.encode(sample.actions[None])[0])
        if len(row) > self.max_tokens:
            raise ValueError(
                f"a chunk takes {len(row)} tokens with begin and end, over the limit of {self.max_tokens}; "
                f"train with data.fast.max_tokens={len(row)} or more, or 0"
            )
        tokens = np.zeros(self.max_tokens, np.int32)
        tokens[: len(row)] = row
        position = np.arange(self.max_tokens)
        mask = position < len(row)
        sample = sample.replace(
            action_tokens=ActionTokens(tokens, mask, mask & (position >= len(self.ids.begin)))
        )
        return sample if self.keep_actions else sample.replace(actions=None, action_mask=None)

    def outputs(self, sample: Sample) -> Sample:
        """Nothing to undo: tokens become actions by `decode`, before the other transforms are undone."""
        return sample

    def decode(self, ids: Int[np.ndarray, "*n g"], mask: Bool[np.ndarray, "*n g"]) -> DecodedChunks:
        """Chunks of sampled ids (without begin and end); whatever they are, a chunk comes out."""
        rows, valid = ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])
        found = [
            self.fast.decode(self.ids.fast(row[keep]).tolist(), self.horizon, self.action_dim)
            for row, keep in zip(rows, valid)
        ]
        shape = ids.shape[:-1]
        return DecodedChunks(
            np.stack([chunk.actions for chunk in found]).reshape(*shape, self.horizon, self.action_dim),
            np.asarray([chunk.malformed for chunk in found]).reshape(shape),
        )

    def coefficients(self, vocab: int) -> Int[np.ndarray, " v"]:
        """How many coefficients each id of a model's vocabulary stands for: 0 for text, 1 where that can't be said."""
        lengths = self.fast.lengths
        counts = np.zeros(vocab, np.int32)
        ids = self.ids.first + self.ids.step * np.arange(self.fast.vocab_size)
        counts[ids] = 1 if lengths is None else lengths
        return counts

    @property
    def total(self) -> int:
        """Coefficients of a chunk; 0 where tokens hold pieces of them, so that counting says nothing."""
        return 0 if self.fast.lengths is None else self.horizon * self.action_dim

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk, begin and end not counted."""
        return self.max_tokens - len(self.ids.begin) - len(self.ids.end)
