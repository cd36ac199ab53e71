"""Prompts as the compiled program takes them: token rows cut to a length, their embeddings kept on the device."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float

from vla_jax.data.tokenizer import TextTokens
from vla_jax.serve.compiled.program import Text

_KEPT = 256
"""Batches of prompts whose embeddings stay on the device."""


class Prompts:
    """Embeds and remembers. `table` None: token ids are sent and embedded by the program."""

    def __init__(self, table: Float[np.ndarray, "v d"] | None, dtype: str, place: Callable[[Text], Text]):
        self._table, self._place = table, place
        self._dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._kept: OrderedDict[tuple, Text] = OrderedDict()

    def batch(self, rows: Sequence[TextTokens], length: int, sees: bool) -> Text:
        """Some rows cut to one length, on the device."""
        key = (*(part.tobytes() for row in rows for part in (row.tokens, row.mask, row.causal)), length, sees)
        found = self._kept.pop(key, None)
        if found is None:
            found = self._make(rows, length, sees)
        self._kept[key] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _make(self, rows: Sequence[TextTokens], length: int, sees: bool) -> Text:
        tokens, mask, causal, _ = (np.stack(part)[:, :length] for part in zip(*rows))
        if self._table is not None:
            width = np.asarray(self._table.shape[1] ** 0.5, self._dtype)
            tokens = self._table[tokens].astype(self._dtype) * width
        return self._place(Text(tokens, mask, causal if sees else None))


def used(text: TextTokens) -> int:
    """Tokens without the padding behind them."""
    return int(np.flatnonzero(text.mask)[-1]) + 1


def null(text: TextTokens) -> TextTokens:
    """The prompt of an empty instruction, as `vla_jax.data.prompts.null_prompt`: its first and last token.

    There they are masked where they stand; here what is masked is left out, which no network can tell.
    """
    prompt = np.flatnonzero(text.mask & ~text.causal)
    ends = np.unique(prompt[[0, -1]])
    tokens, mask = np.zeros_like(text.tokens), np.zeros_like(text.mask)
    tokens[: len(ends)], mask[: len(ends)] = text.tokens[ends], True
    nothing = np.zeros_like(mask)
    return TextTokens(tokens, mask, nothing, nothing)
