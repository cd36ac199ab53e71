"""Action experts: what reads a noisy chunk beside the backbone's context. `base.py` says what one is."""

from vla_jax.models.experts.base import ExpertConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.experts.tokens import TokensConfig

EXPERTS: dict[str, type[ExpertConfig]] = {
    "dit": DitConfig,
    "joint": JointConfig,
    "tokens": TokensConfig,
}
"""By the name in `model.expert.kind`."""
