"""The numbers of a configuration that a training step can take as arrays instead of constants.

A step built from a configuration compiles them in. One program that trains many models at once (`vla_jax.lab`) maps
over them, so there they are arguments of the step.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, UInt32


class Knobs(NamedTuple):
    """What may differ between models that are trained by one program; scalars."""

    seed: UInt32[Array, "*cells"]
    """TrainConfig.seed: of augmentation, times and noise. The order of the data is not the step's business."""
    weights: dict[str, Float[Array, "*cells"]]
    """λ of each term that the step's own configuration computes, by name; above 0."""
    insulation: Float[Array, "*cells"]
    """objective.insulation."""
    learning_rate: Float[Array, "*cells"]
    """optim.learning_rate over that of the step's own configuration."""
