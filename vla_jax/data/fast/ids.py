"""Where FAST tokens lie in a language model's vocabulary."""

import dataclasses

import numpy as np
from jaxtyping import Int

from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.tokenizer import EOS, Tokenizer


@dataclasses.dataclass(frozen=True)
class ActionIds:
    """FAST token i has the id `first + step · i`; a chunk is written as ``[begin][tokens][end]``."""

    first: int
    step: int
    begin: tuple[int, ...]
    end: tuple[int, ...]

    def of(self, tokens: list[int]) -> list[int]:
        """A whole row of ids, begin and end included."""
        return [*self.begin, *(self.first + self.step * token for token in tokens), *self.end]

    def fast(self, ids: Int[np.ndarray, " g"]) -> Int[np.ndarray, " g"]:
        """FAST tokens of ids; those of other text come out negative or beyond the FAST vocabulary."""
        return (ids - self.first) * self.step


def action_ids(tokenizer: Tokenizer, fast: FastTokenizer) -> tuple[ActionIds, int]:
    """The ids, and how many entries text and actions have together.

    PaliGemma's vocabulary has no room behind it: there FAST tokens count down from its last location token, 257,023,
    behind "Action: " and before "|" and the end, as in openpi's π0-FAST. Others get further entries and a begin token.
    """
    last_location = tokenizer.last_location
    if last_location is None:
        size = tokenizer.vocab_size
        begin = size + fast.vocab_size
        return ActionIds(first=size, step=1, begin=(begin,), end=(EOS,)), begin + 1
    if fast.vocab_size > last_location:
        raise ValueError(f"{fast.vocab_size} FAST tokens do not fit below id {last_location}")
    ids = ActionIds(
        first=last_location,
        step=-1,
        begin=tuple(tokenizer.encode("Action: ")),
        end=(*tokenizer.encode("|"), EOS),
    )
    return ids, tokenizer.vocab_size
