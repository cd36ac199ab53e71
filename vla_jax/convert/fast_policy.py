"""What a π0-FAST needs beyond its weights to be a policy: FAST's files, and sizes that no file says.

openpi 15a9616: models/pi0_fast.py (greedy, 256 steps, "Action: " among them; the robot's own dims, not padded),
models/tokenizer.py (ids from PaliGemma's last location token downwards, between "Action: " and "|" with the end).
"""

import dataclasses
from pathlib import Path

from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.ids import action_ids
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.tokenizer import Tokenizer
from vla_jax.models.config import VLAConfig

STEPS = 256
"""Tokens that openpi writes at most, "Action: " included."""


def read_fast(folder: Path | None, model: VLAConfig) -> FastTokenizer | None:
    """FAST's files where the model writes its actions as tokens. Raises ValueError, or OSError, naming --fast."""
    if model.expert.is_network:
        if folder is not None:
            raise ValueError("--fast would do nothing here: these weights have an expert for their actions")
        return None
    if folder is None:
        raise ValueError(
            "these weights write their actions as FAST tokens: give --fast, a folder with physical-intelligence/fast's "
            "tokenizer.json and processor_config.json"
        )
    try:
        return FastTokenizer.load(folder)
    except OSError as error:
        raise FileNotFoundError(f"--fast: {error}") from None
    except ValueError as error:  # a file that is no JSON, too
        raise ValueError(f"--fast {folder}: {error}") from None


def sized(
    model: VLAConfig, fast: FastTokenizer, *, horizon: int | None, state_dim: int, action_dim: int
) -> VLAConfig:
    """The model with the chunks' length and the robot's dims, which the weights do not depend on."""
    chunk = horizon or fast.horizon
    if chunk is None:
        raise ValueError(
            "neither these weights nor FAST's files say how many actions a chunk has: give --horizon, the "
            "action_horizon of openpi's configuration (10 for pi0_fast_droid and pi0_fast_libero)"
        )
    if fast.horizon not in (None, chunk):
        raise ValueError(f"--horizon {chunk}: the files of --fast are for chunks of {fast.horizon} actions")
    if fast.action_dim not in (None, action_dim):
        raise ValueError(
            f"--fast: its files are for {fast.action_dim} action dims, the robot has {action_dim}; use those that the "
            "weights were trained with"
        )
    expert = dataclasses.replace(
        model.expert, horizon=chunk, state_dim=state_dim, action_dim=action_dim, padding="zero"
    )
    return dataclasses.replace(model, expert=expert)


def tokenize_actions(model: VLAConfig, tokenizer: Tokenizer, fast: FastTokenizer) -> TokenizeActions:
    """The way between chunks and the decoder's ids. Raises ValueError where the vocabulary is not PaliGemma's."""
    if tokenizer.last_location is None:
        raise ValueError(
            "--tokenizer: it has no <seg000>, so it is not PaliGemma's, whose last location tokens are the ids of "
            "π0-FAST's actions"
        )
    ids, _ = action_ids(tokenizer, fast)
    limit = STEPS - len(ids.begin)
    return TokenizeActions(
        fast=fast,
        ids=ids,
        horizon=model.expert.horizon,
        action_dim=model.expert.action_dim,
        max_tokens=STEPS + len(ids.end),
        keep_actions=False,
        limit=limit,
    )
