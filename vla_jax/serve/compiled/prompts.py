"""Prompts as the compiled program takes them: token rows cut to a length."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_jax.data.tokenizer import TextTokens
from vla_jax.serve.compiled.program import Text


def stacked(rows: Sequence[TextTokens], length: int, *, plan_visible: bool) -> Text:
    """Some rows cut to one length; without plans the program need not be told which tokens are."""
    tokens, mask, causal, _ = (np.stack(part)[:, :length] for part in zip(*rows))
    host: tuple[Any, ...] = (tokens.astype(np.int32), mask, causal if plan_visible else None)
    return Text(*host)


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
