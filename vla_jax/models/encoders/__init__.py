"""Image encoders: pictures to tokens."""

from vla_jax.models.encoders.siglip import SigLIP

ENCODERS = {"siglip": SigLIP}
