"""One training step: draw, differentiate (in microbatches), update, average.

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
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.transfusion import Counts, Draws, Losses, Model, count, draw, transfusion_loss
from vla_jax.train.state import TrainState
from vla_jax.types import Batch, PyTree

Metrics = dict[str, Float[Array, "..."]]


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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key_augment, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        batch = augment(key_augment, batch, config.augment)
        draws = draw(key_draw, batch, process, config.objective)
        gradients, losses = _gradients(model, process, config, state.params, batch, draws)
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
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics = _metrics(losses, config.objective) | {
            "loss": losses.total,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "skipped": (~finite).astype(jnp.float32),
        }
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return train_step


def make_eval_step(
    model: Model, process, config: TrainConfig
) -> Callable[[PyTree, Batch, PRNGKeyArray], EvalSums]:
    """Builds `(params, batch, key) → EvalSums`: the same losses, without augmentation."""

    def eval_step(params: PyTree, batch: Batch, key: PRNGKeyArray) -> EvalSums:
        draws = draw(key, batch, process, config.objective)
        one = Counts(jnp.ones(()), jnp.ones(()))
        sums = _loss(model, process, config, params, batch, draws, one)
        return EvalSums(sums, count(batch, config.objective))

    return eval_step


def _loss(
    model: Model, process, config: TrainConfig, params: PyTree, batch: Batch, draws: Draws, counts: Counts
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
    )


def _gradients(
    model: Model, process, config: TrainConfig, params: PyTree, batch: Batch, draws: Draws
) -> tuple[PyTree, Losses]:
    """Gradient and losses of the whole batch, in `accumulate` microbatches.

    Each microbatch's loss is its share of the batch's (the denominators are those of the batch), so shares and
    gradients add up, whatever the masks. Microbatches are strided: every device keeps a part of each.
    """
    counts = count(batch, config.objective)

    def loss(params: PyTree, batch: Batch, draws: Draws) -> tuple[Array, Losses]:
        losses = _loss(model, process, config, params, batch, draws, counts)
        return losses.total, losses

    gradient = jax.grad(loss, has_aux=True)
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
        by_time = losses.action_by_time / jnp.maximum(losses.elements_by_time, 1)
        metrics |= {"action_loss": losses.action, "time_histogram": losses.time_histogram}
        metrics |= {"action_loss_by_time": by_time}
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
