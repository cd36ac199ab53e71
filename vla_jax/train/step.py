"""One training step: draw, differentiate (in microbatches), weigh, update, average.

`make_train_step` returns a pure function `(state, batch) → (state, metrics)`; jit and shardings are the loop's.
Randomness is `fold_in(key(seed), step)`: a step is a function of its state and batch alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vla_jax.config import TrainConfig
from vla_jax.data.augment import augment
from vla_jax.data.prompts import drop_prompts
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.transfusion import Counts, Losses, Model, count, draw
from vla_jax.train import spikes
from vla_jax.train.knobs import Knobs
from vla_jax.train.optim import updates_applied
from vla_jax.train.parts import network
from vla_jax.train.state import TrainState
from vla_jax.train.weigh import Metrics, Problem, is_plain
from vla_jax.types import Batch, PyTree


class EvalSums(NamedTuple):
    """Sums over one validation batch and what to divide them by; see `add_up`."""

    sums: Losses
    counts: Counts


def make_train_step(
    model: Model, process, config: TrainConfig, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the step. Metrics are those of the whole batch, before the update.

    A step whose loss or gradient is not finite changes nothing but the step count, and says `skipped` 1; so does
    a spike (`train.spike_sigma`), which says `spiked` 1. A third argument, `Knobs`, takes the place of some
    constants of the configuration.
    """
    objective, whole, tx = config.objective, model, optax.with_extra_args_support(tx)
    every, log_every = objective.diagnostics.every, config.train.log_every
    if every % log_every:
        raise ValueError(
            f"objective.diagnostics.every={every} is not a multiple of train.log_every={log_every}"
        )

    def train_step(state: TrainState, batch: Batch, knobs: Knobs | None = None) -> tuple[TrainState, Metrics]:
        model = network(whole, state.frozen, config.lora.scale)
        seed = config.seed if knobs is None else knobs.seed
        key_augment, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        batch = augment(key_augment, batch, config.augment)
        if objective.prompt_dropout:
            key_prompt = jax.random.fold_in(key_draw, 3)  # `draw` uses the children 0 to 2
            batch = drop_prompts(key_prompt, batch, objective.prompt_dropout)
        draws = draw(key_draw, batch, process, config.objective)
        problem = Problem(model, process, config, knobs)
        gradients, losses, remembered, weights = problem.weighed(state, batch, draws)
        norm = optax.tree.norm(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params, step=state.step)
        if knobs is not None:  # the learning rate is the last factor of every update
            updates = jax.tree.map(lambda u: knobs.learning_rate * u, updates)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if config.train.ema_decay is not None:
            decay = averaging(config.train.ema_decay, updates_applied(state.opt_state))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)

        finite = keep = jnp.isfinite(losses.total) & jnp.isfinite(norm)
        recent, spiked = state.spikes, {}
        if config.train.spike_sigma:
            is_spike = spikes.is_spike(recent, losses.total, norm, config.train.spike_sigma)
            keep, spiked = finite & ~is_spike, {"spiked": (finite & is_spike).astype(jnp.float32)}
            recent = spikes.remember(recent, losses.total, norm)
        new = (params, opt_state, ema, remembered)
        old = (state.params, state.opt_state, state.ema, state.weighting)
        # While tracing: an update of another type would change the state's for good, and be saved so.
        chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
        params, opt_state, ema, remembered = jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)
        metrics = _metrics(losses, config.objective) | {
            "loss": losses.total,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "skipped": (~finite).astype(jnp.float32),
        }
        metrics |= spiked
        if not is_plain(objective):
            metrics |= {"text_weight": weights.text, "action_weight": weights.action}
        if every:
            metrics |= problem.diagnostics(state, batch, draws, weights)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            weighting=remembered,
            spikes=recent,
        )
        return state, metrics

    return train_step


def averaging(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """What is kept of the average after so many earlier updates: min(decay, (1 + n) / (10 + n)).

    So the average forgets where the run began: of n updates the start's share is about 9!/n⁹, where a constant decay
    would leave decayⁿ, 82 % of 200 updates at 0.999.
    """
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def make_eval_step(
    model: Model, process, config: TrainConfig
) -> Callable[[PyTree, Batch, PRNGKeyArray], EvalSums]:
    """Builds `(params, batch, key) → EvalSums`: the same losses, without augmentation, of all parameters."""
    problem = Problem(network(model, None, config.lora.scale), process, config)

    def eval_step(params: PyTree, batch: Batch, key: PRNGKeyArray) -> EvalSums:
        draws = draw(key, batch, process, config.objective)
        one = Counts(jnp.ones(()), jnp.ones(()))
        sums = problem.losses(params, batch, draws, one)
        return EvalSums(sums, count(batch, config.objective, draws))

    return eval_step


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
