"""vla_jax: vision-language-action models in JAX/Flax, from a laptop to a TPU pod."""

__version__ = "0.1.0"
