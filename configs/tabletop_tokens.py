"""The quickstart's tabletop by a policy without an expert: the decoder writes chunks as FAST tokens. docs/tokens.md

python -m launch.collect --env tabletop --episodes 10000 --out data/tabletop
python -m launch.train --config configs/tabletop_tokens.py --run-dir runs/tokens
python -m launch.evaluate --checkpoint runs/tokens --episodes 512

The state has no token of its own here: it stands in the prompt, as numbers.
"""

import dataclasses
from pathlib import Path

from vla_jax.cli.config_file import load_config
from vla_jax.config import TrainConfig
from vla_jax.data.fast.config import FastConfig
from vla_jax.models.kinds import of_kind


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("tabletop.py"))
    expert = of_kind(base.model.expert, "tokens", "model.expert")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, expert=expert),
        data=dataclasses.replace(
            base.data,
            prompt="fast",
            normalization="quantile",  # the prompt's bins are of [-1, 1]
            max_text_tokens=64,
            fast=FastConfig(scale=10.0, vocab_size=512),
        ),
    )
