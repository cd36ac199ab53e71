"""The optimiser: clip → Adam or Muon → decoupled weight decay → learning rate (AdamW: arXiv:1711.05101).

It sees the trained parameters only, so what is frozen has no state in it (`train/parts.py`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from vla_jax.sharding.rules import is_box, path_name
from vla_jax.train.config import OptimConfig, ParameterGroup
from vla_jax.train.moments import with_moment_in
from vla_jax.train.muon import scale_by_muon
from vla_jax.train.patterns import choose, fits, leaf_names
from vla_jax.types import PyTree


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0, of a run of `steps` steps.

    With W warm-up steps and H steps of hold,

        lr(i) = peak · min((i + 1) / W, 1) · [f + (1 - f) · (1 + cos πu) / 2],
        u = clip((i - W - H) / (steps - W - H), 0, 1)
    """
    warmup = round(config.warmup_fraction * steps)
    start = warmup + round(config.hold_fraction * steps)

    def schedule(i: ArrayLike) -> Float[Array, ""]:
        i = jnp.asarray(i)
        rise = jnp.minimum((i + 1) / max(warmup, 1), 1.0)
        u = jnp.clip((i - start) / max(steps - start, 1), 0.0, 1.0)
        fall = config.final_fraction + (1 - config.final_fraction) * (1 + jnp.cos(jnp.pi * u)) / 2
        return config.learning_rate * rise * fall

    return schedule


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a run of `steps` steps. `update` takes the run's step, from which the learning rate follows.

    A step that is left out changes no state in here, so that every count in it is one of updates applied: Adam
    corrects its bias by it, and the average of the parameters warms up by it (`updates_applied`).
    """
    # Clipped before the moments see it. Decay comes after the direction, decoupled from the moments as in AdamW; the
    # groups' factors come last, so that they scale the decay too.
    parts = [
        _clip(config),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, decays if config.decay == "matrices" else None),
        _scale_by_rate_of_step(learning_rate(config, steps)),
    ]
    groups = config.parsed_groups()
    return optax.chain(*parts, *([_factors(groups)] if groups else []))


def _scale_by_rate_of_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the rate of the run's `step`: the rate that is logged, however many steps were left out.

    Its own count is not the step: it is of updates applied.
    """

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        del params
        assert isinstance(state, optax.ScaleByScheduleState)
        rate = jnp.asarray(schedule(extra["step"]))
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def updates_applied(state: optax.OptState) -> Int[Array, ""]:
    """How many updates the optimiser of `make_optimizer` has made; steps that were left out do not count."""
    assert isinstance(state, tuple)  # of a chain
    (count,) = (s.count for s in state if isinstance(s, optax.ScaleByScheduleState))
    return jnp.asarray(count)


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    moments = (config.beta1, config.beta2, config.eps)
    if config.algorithm == "muon":
        return scale_by_muon(*moments, config.moment_dtype)
    return with_moment_in(config.moment_dtype, optax.scale_by_adam(*moments))


def decays(params: PyTree) -> PyTree:
    """True for the matrices among the parameters: whatever is not a bias, a norm's scale or an embedding."""

    def is_matrix(path, _) -> bool:
        name = path_name(path).split("/")[-1]
        return name not in ("bias", "scale") and not name.endswith("embedding")

    return jax.tree_util.tree_map_with_path(is_matrix, params, is_leaf=is_box)


def _clip(config: OptimConfig) -> optax.GradientTransformation:
    if any(group.clip is not None for group in config.parsed_groups()):
        return _clip_by_pattern(config)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip == "global":
        return clip
    return _per_group(clip)


def _clip_by_pattern(config: OptimConfig) -> optax.GradientTransformation:
    """Groups with a clip of their own by themselves; what is left by `config.clip`."""
    groups = config.parsed_groups()

    def bucket(path: KeyPath) -> tuple[str, float]:
        """Parameters with the same answer are clipped together, to this norm."""
        name = path_name(path)
        group = group_of(name, groups)
        if group is not None and group.clip is not None:
            return group.pattern, group.clip
        return (name.split("/")[0] if config.clip == "per_group" else ""), config.clip_norm

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        squares: dict[tuple[str, float], Array] = {}
        for path, g in tree_leaves_with_path(updates):
            squares[bucket(path)] = squares.get(bucket(path), 0.0) + jnp.sum(jnp.square(g))

        def scale(path: KeyPath, g: Array) -> Array:
            _, most = bucket(path)
            norm = jnp.sqrt(squares[bucket(path)])
            return jnp.where(norm < most, g, g / norm * most)  # rounded as by optax.clip_by_global_norm

        return tree_map_with_path(scale, updates)

    return optax.stateless(update)


def _factors(groups: Sequence[ParameterGroup]) -> optax.GradientTransformation:
    """Multiplies each group's update. Raises ValueError at its start where a pattern fits no trained parameter."""

    def init(params: PyTree) -> optax.EmptyState:
        names = leaf_names(params)
        for group in groups:
            choose(names, [group.pattern], "optim.groups (of the trained parameters)")
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None):
        del params

        def scale(path: KeyPath, u: Array) -> Array:
            group = group_of(path_name(path), groups)
            return u if group is None else group.factor * u

        return tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The group of a parameter: the first whose pattern fits."""
    return next((group for group in groups if fits(name, group.pattern)), None)


def _per_group(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a stateless transformation to each top-level group of the tree by itself.

    A group with its own loss must not be scaled down by the gradient of another.
    """

    def update(updates, state, params=None):
        return {name: tx.update(group, tx.init(group))[0] for name, group in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
