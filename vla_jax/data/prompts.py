"""The null prompt: what classifier-free guidance compares an instruction with (Ho & Salimans 2207.12598).

It is the prompt of an empty instruction, `[bos separator]`: the instruction's tokens are masked where they stand.
Positions count valid tokens only, so a network sees exactly what it would see of "". A text target names what was
asked for, so it goes too. A prompt form that tells the state in words loses the state with the instruction: the null
prompt then is images alone. Everything here runs on the device, or on the host for a batch of numpy arrays.
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from vla_jax.types import Batch


def null_prompt(batch: Batch) -> Batch:
    """The batch without instructions and text targets."""
    return _without(batch, np.ones(batch.tokens.shape[0], bool))


def drop_prompts(key: PRNGKeyArray, batch: Batch, rate: float) -> Batch:
    """The batch with each sample's prompt replaced by the null prompt with probability `rate` (alg. 1)."""
    return _without(batch, jax.random.bernoulli(key, rate, (batch.tokens.shape[0],)))


def _without(batch: Batch, dropped: Bool[Array | np.ndarray, " b"]) -> Batch:
    """Of the prompt `[bos … separator]` only the first and the last token stay."""
    prompt = batch.token_mask & ~batch.token_causal
    number = prompt.cumsum(axis=1)
    ends = prompt & ((number == 1) | (number == number[:, -1:]))
    keep = ~dropped[:, None] | ends
    return batch.replace(token_mask=batch.token_mask & keep, token_loss=batch.token_loss & keep)
