"""A FAST tokenizer for given chunks: the alphabet of their coefficients, and BPE over it."""

import json

import numpy as np
import tokenizers
from jaxtyping import Float
from tokenizers import decoders, models, trainers

from vla_jax.data.fast.codec import MOST_CHARACTERS, FastTokenizer


def train_fast(
    chunks: Float[np.ndarray, "n k a"], *, vocab_size: int = 1024, scale: float = 10.0
) -> FastTokenizer:
    """A tokenizer of at most `vocab_size` ids for normalised chunks; the same for the same chunks.

    Raises ValueError where the coefficients alone are more than that.
    """
    _, horizon, action_dim = chunks.shape
    settings = {"scale": scale, "min_token": 0, "time_horizon": horizon, "action_dim": action_dim}
    blank = tokenizers.Tokenizer(models.BPE(vocab={"\0": 0}, merges=[]))
    files = {"tokenizer.json": blank.to_str(), "processor_config.json": json.dumps(settings)}
    values = FastTokenizer(files).quantize(chunks)
    low, high = int(values.min()), int(values.max())
    needed = high - low + 1
    if needed > MOST_CHARACTERS:
        raise ValueError(
            f"coefficients from {low} to {high} need an alphabet of {needed}, more than the {MOST_CHARACTERS} that "
            f"there can be; use a lower scale than data.fast.scale={scale:g}, or look for outliers in the actions"
        )
    if needed > vocab_size:
        raise ValueError(
            f"coefficients from {low} to {high} need {needed} tokens, more than vocab_size={vocab_size}; "
            "raise it, lower the scale, or look for outliers in the actions"
        )
    alphabet = [chr(i) for i in range(needed)]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        min_frequency=2,
        special_tokens=[],
        show_progress=False,
    )
    texts = ("".join(map(chr, row)) for row in (values - low).reshape(len(values), -1))
    bpe.train_from_iterator(texts, trainer)
    settings |= {
        "min_token": low,
        "vocab_size": bpe.get_vocab_size(),
        "processor_class": "UniversalActionProcessor",
    }
    return FastTokenizer(
        {"tokenizer.json": bpe.to_str(), "processor_config.json": json.dumps(settings, indent=2)}
    )
