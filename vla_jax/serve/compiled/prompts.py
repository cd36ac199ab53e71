"""Prompts as the compiled program takes them: token rows cut to a length, their embeddings kept on the device."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from vla_jax.data.tokenizer import TextTokens
from vla_jax.serve.compiled.program import Text

KEPT_BYTES = 1 << 27
"""Of prompts on the device, all together: some 160 of π0.5's 200 tokens, in bfloat16."""


class _Batch(NamedTuple):
    """Prompts that came together."""

    keys: tuple
    text: Text


class Prompts:
    """Embeds and remembers each prompt by itself, so that clients who come together in any order find theirs.

    `table` None: token ids are sent and embedded by the program. The least recently asked for are forgotten first. The
    last batch is kept as it is: robots in lockstep ask for the same one again and again.
    """

    def __init__(
        self,
        table: Float[np.ndarray, "v d"] | None,
        dtype: str,
        place: Callable[[Text], Text],
        most_bytes: int = KEPT_BYTES,
    ):
        self._table, self._place, self._most = table, place, most_bytes
        self._dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._rows: OrderedDict[tuple, Text] = OrderedDict()
        self._last: _Batch | None = None
        self.kept_bytes = 0
        """Of single prompts; the last batch comes on top."""

    def batch(self, rows: Sequence[TextTokens], length: int, sees: bool) -> Text:
        """Some rows cut to one length, on the device."""
        keys = tuple(
            (row.tokens.tobytes(), row.mask.tobytes(), row.causal.tobytes(), length, sees) for row in rows
        )
        if self._last is None or self._last.keys != keys:
            found = [self._row(row, key) for row, key in zip(rows, keys)]
            self._last = _Batch(keys, self._place(found[0] if len(found) == 1 else _joined(found)))
        return self._last.text

    def _row(self, row: TextTokens, key: tuple) -> Text:
        """One prompt, [1 l …]."""
        found = self._rows.pop(key, None)
        if found is None:
            found = jax.device_put(self._make([row], *key[-2:]))
            self.kept_bytes += _bytes(found)
        self._rows[key] = found
        while self.kept_bytes > self._most and len(self._rows) > 1:
            self.kept_bytes -= _bytes(self._rows.popitem(last=False)[1])
        return found

    def _make(self, rows: Sequence[TextTokens], length: int, sees: bool) -> Text:
        tokens, mask, causal, _ = (np.stack(part)[:, :length] for part in zip(*rows))
        if self._table is not None:
            width = np.asarray(self._table.shape[1] ** 0.5, self._dtype)
            tokens = self._table[tokens].astype(self._dtype) * width
        return Text(tokens, mask, causal if sees else None)


@jax.jit
def _joined(rows: Sequence[Text]) -> Text:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def _bytes(text: Text) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(text))


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
