"""The optimiser: clip → Adam or Muon → decoupled weight decay → learning rate (AdamW: arXiv:1711.05101)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vla_jax.sharding.rules import is_box, path_name
from vla_jax.train.config import OptimConfig
from vla_jax.train.muon import scale_by_muon
from vla_jax.types import PyTree


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0, of a run of `steps` steps.

    With W warm-up steps and H steps of hold,

        lr(i) = peak · min((i + 1) / W, 1) · [f + (1 - f) · (1 + cos πu) / 2],
        u = clip((i - W - H) / (steps - W - H), 0, 1)
    """
    warmup = round(config.warmup_fraction * steps)
    start = warmup + round(config.hold_fraction * steps)

    def schedule(i: Int[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum((i + 1) / max(warmup, 1), 1.0)
        u = jnp.clip((i - start) / max(steps - start, 1), 0.0, 1.0)
        fall = config.final_fraction + (1 - config.final_fraction) * (1 + jnp.cos(jnp.pi * u)) / 2
        return config.learning_rate * rise * fall

    return schedule


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps` steps."""
    return optax.chain(
        _clip(config),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, decays if config.decay == "matrices" else None),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    moments = (config.beta1, config.beta2, config.eps)
    if config.algorithm == "muon":
        return scale_by_muon(*moments, config.moment_dtype)
    return optax.scale_by_adam(*moments, mu_dtype=jnp.dtype(config.moment_dtype))


def decays(params: PyTree) -> PyTree:
    """True for the matrices among the parameters: whatever is not a bias, a norm's scale or an embedding."""

    def is_matrix(path, _) -> bool:
        name = path_name(path).split("/")[-1]
        return name not in ("bias", "scale") and not name.endswith("embedding")

    return jax.tree_util.tree_map_with_path(is_matrix, params, is_leaf=is_box)


def _clip(config: OptimConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip == "global":
        return clip
    return _per_group(clip)


def _per_group(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a stateless transformation to each top-level group of the tree by itself.

    A group with its own loss must not be scaled down by the gradient of another.
    """

    def update(updates, state, params=None):
        return {name: tx.update(group, tx.init(group))[0] for name, group in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
