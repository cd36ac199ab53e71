"""Which FAST tokenizer a run uses."""

import dataclasses

from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("data.fast.")
class FastConfig:
    """A tokenizer from files, or one trained on the data set's own normalised chunks."""

    path: str = ""
    """Directory with tokenizer.json and processor_config.json, as launch.train_fast writes it and as
    physical-intelligence/fast is laid out. Empty: trained on the data set; the next three say how."""
    vocab_size: int = 1024
    """Tokens: one for every quantised coefficient that occurs, the others for what occurs together."""
    scale: float = 10.0
    """What coefficients are multiplied by before rounding: twice as much halves the error and costs more tokens."""
    chunks: int = 50_000
    """Chunks that it is trained on, drawn from the training episodes."""
    max_tokens: int = 0
    """Tokens of a chunk in a batch, with begin and end; a longer chunk is refused. 0: as the data set's longest."""
    max_targets: int = 0
    """How many of these are targets (the chunk and its end): logits are computed for so many positions. 0: as the
    data set has; more changes nothing, less is refused."""

    def __post_init__(self):
        for name, least in {"vocab_size": 2, "chunks": 1, "max_tokens": 0, "max_targets": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.fast.{name}={getattr(self, name)}: must be at least {least}")
        if not self.scale > 0:
            raise ValueError(f"data.fast.scale={self.scale}: must be positive")
