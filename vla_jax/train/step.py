"""One training step: draw, differentiate (in microbatches), weigh, update, average.

`make_train_step` returns a pure function `(state, batch) → (state, metrics)`; jit and shardings are the loop's.
Randomness is `fold_in(key(seed), step)`: a step is a function of its state and batch alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.config import TrainConfig
from vla_jax.data.augment import augment
from vla_jax.data.prompts import drop_prompts
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.diagnostics import as_metrics, diagnose
from vla_jax.objectives.transfusion import (
    Counts,
    Draws,
    Losses,
    Model,
    count,
    draw,
    reduction,
    timed_losses,
    transfusion_loss,
)
from vla_jax.objectives.weighting import (
    Pair,
    Weighting,
    WeightingConfig,
    combine,
    make_weighting,
    per_loss,
    trunk,
)
from vla_jax.train.state import TrainState
from vla_jax.types import Batch, PyTree

Metrics = dict[str, Float[Array, "..."]]


class Weighed(NamedTuple):
    """What a step's batch says about the parameters."""

    gradients: PyTree
    losses: Losses
    weighting: PyTree | None
    """The next state of the λ policy."""
    weights: Pair
    """What multiplied the two mean losses' gradients on the trunk."""


class EvalSums(NamedTuple):
    """Sums over one validation batch and what to divide them by; see `add_up`."""

    sums: Losses
    counts: Counts


def make_train_step(
    model: Model, process, config: TrainConfig, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step. Metrics are those of the whole batch, before the update.

    A step whose loss or gradient is not finite changes nothing but the step count, and says `skipped` 1.
    """
    objective = config.objective
    every, log_every = objective.diagnostics.every, config.train.log_every
    if every % log_every:
        raise ValueError(
            f"objective.diagnostics.every={every} is not a multiple of train.log_every={log_every}"
        )
    weighting = None if is_plain(objective) else policy_of(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key_augment, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        batch = augment(key_augment, batch, config.augment)
        if objective.prompt_dropout:
            key_prompt = jax.random.fold_in(key_draw, 3)  # `draw` uses the children 0 to 2
            batch = drop_prompts(key_prompt, batch, objective.prompt_dropout)
        draws = draw(key_draw, batch, process, config.objective)
        if weighting is None:
            weights = Pair(1.0, objective.action_weight)
            gradients, losses = _gradients(model, process, config, state.params, batch, draws)
            remembered = state.weighting
        else:
            gradients, losses, remembered, weights = _weighed(
                model, process, config, weighting, state, batch, draws
            )
        norm = optax.tree.norm(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = config.train.ema_decay
        ema = (
            None
            if decay is None
            else jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        )

        finite = jnp.isfinite(losses.total) & jnp.isfinite(norm)
        params, opt_state, ema, remembered = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema, remembered),
            (state.params, state.opt_state, state.ema, state.weighting),
        )
        metrics = _metrics(losses, config.objective) | {
            "loss": losses.total,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "skipped": (~finite).astype(jnp.float32),
        }
        if weighting is not None:
            metrics |= {"text_weight": weights.text, "action_weight": weights.action}
        if every:
            metrics |= _diagnostics(model, process, config, state, batch, draws, weights)
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, weighting=remembered
        )
        return state, metrics

    return train_step


def policy_of(config: TrainConfig) -> Weighting:
    """The λ policy of a run."""
    return make_weighting(config.objective.weighting, config.objective.action_weight, config.train.steps)


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is CE + λ · L(actions) with a constant λ between means: no weight depends on anything."""
    reductions = (objective.text_reduction, objective.action_reduction)
    return objective.weighting.policy == "fixed" and reductions == ("mean", "mean")


def make_eval_step(
    model: Model, process, config: TrainConfig
) -> Callable[[PyTree, Batch, PRNGKeyArray], EvalSums]:
    """Builds `(params, batch, key) → EvalSums`: the same losses, without augmentation."""

    def eval_step(params: PyTree, batch: Batch, key: PRNGKeyArray) -> EvalSums:
        draws = draw(key, batch, process, config.objective)
        one = Counts(jnp.ones(()), jnp.ones(()))
        sums = _loss(model, process, config, params, batch, draws, one)
        return EvalSums(sums, count(batch, config.objective, draws))

    return eval_step


def _loss(
    model: Model,
    process,
    config: TrainConfig,
    params: PyTree,
    batch: Batch,
    draws: Draws,
    counts: Counts,
    weights: Pair | None = None,
) -> Losses:
    return transfusion_loss(
        model,
        process,
        config.objective,
        params,
        batch,
        draws,
        counts,
        target_tokens=config.data.max_target_tokens,
        weights=weights,
    )


def _weighed(
    model: Model,
    process,
    config: TrainConfig,
    weighting: Weighting,
    state: TrainState,
    batch: Batch,
    draws: Draws,
) -> Weighed:
    """The gradient as the λ policy wants it. The policy sees the losses in the configured reduction."""
    objective = config.objective
    scale = reduction(batch, objective)
    if weighting.uses_gradients:
        pair, losses = _gradients(model, process, config, state.params, batch, draws, apart=True)
        pair = Pair(*(jax.tree.map(lambda g: s * g, tree) for s, tree in zip(scale, pair)))
        inside = trunk.inside(state.params, objective.weighting.trunk, "objective.weighting.trunk")
        products = trunk.products(pair, inside)
        weights = weighting.weights(state.step, state.weighting, products)
        gradients = combine(weights, pair, inside)
    else:
        products = None
        weights = weighting.weights(state.step, state.weighting, products)

        def both():
            on_means = Pair(*(w * s for w, s in zip(weights.trunk, scale)))
            return _gradients(model, process, config, state.params, batch, draws, weights=on_means)

        def text_only():
            alone = dataclasses.replace(
                objective, action_weight=0.0, weighting=WeightingConfig(), diagnostics=DiagnosticsConfig()
            )
            one = dataclasses.replace(config, objective=alone)
            weights = Pair(scale.text, 0.0)
            return _gradients(model, process, one, state.params, batch, draws, weights=weights)

        # 0 · loss would let a NaN of the expert through, and would compute it.
        is_zero = weights.trunk.action == 0
        gradients, losses = jax.lax.cond(is_zero, text_only, both) if weighting.can_be_zero else both()

    seen = Pair(scale.text * losses.text, scale.action * losses.action)
    total = weights.trunk.text * seen.text + weights.trunk.action * seen.action
    remembered = weighting.update(state.weighting, seen, products)
    if weighting.can_be_zero:  # not computed is not zero
        losses = losses._replace(action=jnp.where(is_zero, jnp.nan, losses.action))
    on_means = Pair(*(w * s for w, s in zip(weights.trunk, scale)))
    return Weighed(gradients, losses._replace(total=total), remembered, on_means)


def _diagnostics(
    model: Model,
    process,
    config: TrainConfig,
    state: TrainState,
    batch: Batch,
    draws: Draws,
    weights: Pair,
) -> Metrics:
    """The comparison of the two gradients before the update, in every n-th step; NaN in the others."""
    diagnostics = config.objective.diagnostics
    inside = trunk.inside(state.params, diagnostics.trunk, "objective.diagnostics.trunk")
    some = jax.tree.map(lambda x: x[:: diagnostics.stride], (batch, draws))  # every device keeps a part

    def losses(params: PyTree):
        return timed_losses(
            model,
            process,
            config.objective,
            params,
            *some,
            bins=diagnostics.time_bins,
            target_tokens=config.data.max_target_tokens,
        )

    def compare() -> Metrics:
        return as_metrics(diagnose(losses, state.params, inside, weights))

    def nothing() -> Metrics:
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(compare))

    return jax.lax.cond((state.step + 1) % diagnostics.every == 0, compare, nothing)


def _gradients(
    model: Model,
    process,
    config: TrainConfig,
    params: PyTree,
    batch: Batch,
    draws: Draws,
    *,
    weights: Pair | None = None,
    apart: bool = False,
) -> tuple[PyTree, Losses]:
    """Gradient and losses of the whole batch, in `accumulate` microbatches; `apart`: a Pair of gradients.

    Each microbatch's loss is its share of the batch's (the denominators are those of the batch), so shares and
    gradients add up, whatever the masks. Microbatches are strided: every device keeps a part of each.
    """
    counts = count(batch, config.objective, draws)

    def loss(params: PyTree, batch: Batch, draws: Draws) -> tuple[Array, Losses]:
        losses = _loss(model, process, config, params, batch, draws, counts, weights)
        return losses.total, losses

    def gradients(params: PyTree, batch: Batch, draws: Draws) -> tuple[Pair, Losses]:
        return per_loss(lambda p: _loss(model, process, config, p, batch, draws, counts), params)

    gradient = gradients if apart else jax.grad(loss, has_aux=True)
    parts = config.train.accumulate
    if parts == 1:
        return gradient(params, batch, draws)

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    microbatches = jax.tree.map(split, (batch, draws))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], microbatches)),
    )
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return total


def _metrics(losses: Losses, objective: ObjectiveConfig) -> Metrics:
    """The reported form of the losses; terms that are switched off are left out, empty bins of t are 0."""
    metrics = {}
    if objective.text:
        metrics |= {"text_loss": losses.text, "text_accuracy": losses.text_accuracy}
    if objective.action_weight > 0:
        metrics |= {"action_loss": losses.action}
    if objective.action_weight > 0 and losses.time_histogram is not None:
        by_time = losses.action_by_time / jnp.maximum(losses.elements_by_time, 1)
        metrics |= {"time_histogram": losses.time_histogram, "action_loss_by_time": by_time}
    return metrics


def add_up(batches: Sequence[EvalSums], objective: ObjectiveConfig) -> Metrics:
    """Validation metrics over several batches: means over all their valid elements."""
    total = jax.tree.map(lambda *sums: sum(sums), *batches)
    means = total.sums._replace(
        text=total.sums.text / total.counts.text,
        action=total.sums.action / total.counts.action,
        text_accuracy=total.sums.text_accuracy / total.counts.text,
    )
    return _metrics(means, objective)
