"""One training step: draw, differentiate (in microbatches), weigh, update, average.

`make_train_step` returns a pure function `(state, batch) → (state, metrics)`; jit and shardings are the loop's.
Randomness is `fold_in(key(seed), step)`: a step is a function of its state and batch alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.config import TrainConfig
from vla_jax.data.augment import augment
from vla_jax.data.prompts import drop_prompts
from vla_jax.flow.processes import Process
from vla_jax.objectives.keys import named
from vla_jax.objectives.objective import StepDraws, term_metrics
from vla_jax.objectives.terms import Model, TermSums
from vla_jax.train import spikes
from vla_jax.train.knobs import Knobs
from vla_jax.train.optim import updates_applied
from vla_jax.train.parts import network
from vla_jax.train.state import TrainState
from vla_jax.train.weigh import Metrics, Problem, Weighed
from vla_jax.types import Batch, PyTree


class EvalSums(NamedTuple):
    """Sums over one validation batch and what to divide them by, by term; see `add_up`."""

    sums: dict[str, TermSums]
    counts: dict[str, Float[Array, ""]]


@runtime_checkable
class TrainStep(Protocol):
    """One step of training as a pure function; `knobs` take the place of numbers of the configuration."""

    def __call__(
        self, state: TrainState, batch: Batch, knobs: Knobs | None = None, /
    ) -> tuple[TrainState, Metrics]:
        """The next state, and the metrics of the batch."""
        ...


def make_train_step(
    model: Model, process: Process, config: TrainConfig, tx: optax.GradientTransformation
) -> TrainStep:
    """Builds the step. Metrics are those of the whole batch, before the update.

    A step whose loss or gradient is not finite changes nothing but the step count, and says `skipped` 1; so does
    a spike (`train.spike_sigma`), which says `spiked` 1. A third argument, `Knobs`, takes the place of some
    constants of the configuration.
    """
    every, log_every = config.objective.diagnostics.every, config.train.log_every
    if every % log_every:
        raise ValueError(
            f"objective.diagnostics.every={every} is not a multiple of train.log_every={log_every}"
        )
    tx = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch, knobs: Knobs | None = None) -> tuple[TrainState, Metrics]:
        problem = Problem(network(model, state.frozen, config.lora.scale), process, config, knobs)
        batch, drawn = _draw(problem, state, batch)
        found = problem.weighed(state, batch, drawn)
        norm = optax.tree.norm(found.gradients)
        updated = _updated(tx, config, state, found, knobs)
        finite = keep = jnp.isfinite(found.total) & jnp.isfinite(norm)
        recent, spiked = state.spikes, {}
        if config.train.spike_sigma:
            is_spike = spikes.is_spike(recent, found.total, norm, config.train.spike_sigma)
            keep, spiked = finite & ~is_spike, {"spiked": (finite & is_spike).astype(jnp.float32)}
            recent = spikes.remember(recent, found.total, norm)
        new = _kept(keep, updated, state)
        new = dataclasses.replace(new, step=state.step + 1, spikes=recent)
        metrics = found.metrics | {
            "loss": found.total,
            "grad_norm": norm,
            "param_norm": optax.tree.norm(new.params),
            "skipped": (~finite).astype(jnp.float32),
        }
        metrics |= spiked
        if every:
            metrics |= problem.diagnostics(state, batch, drawn, found.weights)
        return new, metrics

    return train_step


def _draw(problem: Problem, state: TrainState, batch: Batch) -> tuple[Batch, StepDraws]:
    """The batch as it is learned from (augmented, without some prompts), and what else is random in the step."""
    config, knobs = problem.config, problem.knobs
    seed = config.seed if knobs is None else knobs.seed
    key_augment, key_draw = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    batch = augment(key_augment, batch, config.augment)
    if config.objective.prompt_dropout:
        batch = drop_prompts(named(key_draw, "prompt_dropout"), batch, config.objective.prompt_dropout)
    return batch, problem.objective.draw(key_draw, batch)


def _updated(
    tx: optax.GradientTransformationExtraArgs,
    config: TrainConfig,
    state: TrainState,
    found: Weighed,
    knobs: Knobs | None,
) -> TrainState:
    """The state after the optimiser's update; step and spikes are as they were."""
    updates, opt_state = tx.update(found.gradients, state.opt_state, state.params, step=state.step)
    if knobs is not None:  # the learning rate is the last factor of every update
        updates = jax.tree.map(lambda u: knobs.learning_rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if config.train.ema_decay is not None:
        decay = averaging(config.train.ema_decay, updates_applied(state.opt_state))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema, weighting=found.weighting)


def _kept(keep: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """The new state where it is kept, else the old one."""
    pair = [{n: getattr(s, n) for n in ("params", "opt_state", "ema", "weighting")} for s in (new, old)]
    # While tracing: an update of another type would change the state's for good, and be saved so.
    chex.assert_trees_all_equal_shapes_and_dtypes(*pair)
    return dataclasses.replace(old, **jax.tree.map(lambda n, o: jnp.where(keep, n, o), *pair))


def averaging(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """What is kept of the average after so many earlier updates: min(decay, (1 + n) / (10 + n)).

    So the average forgets where the run began: of n updates the start's share is about 9!/n⁹, where a constant decay
    would leave decayⁿ, 82 % of 200 updates at 0.999.
    """
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def make_eval_step(
    model: Model, process: Process, config: TrainConfig
) -> Callable[[PyTree, Batch, PRNGKeyArray], EvalSums]:
    """Builds `(params, batch, key) → EvalSums`: the same losses, without augmentation, of all parameters."""
    objective = Problem(network(model, None, config.lora.scale), process, config).objective

    def eval_step(params: PyTree, batch: Batch, key: PRNGKeyArray) -> EvalSums:
        drawn = objective.draw(key, batch)
        counts = objective.counts(batch, drawn)
        return EvalSums(objective.losses(params, batch, drawn, counts).terms, counts)

    return eval_step


def add_up(batches: Sequence[EvalSums]) -> Metrics:
    """Validation metrics over several batches: means over all their valid elements."""
    total = jax.tree.map(lambda *sums: sum(sums), *batches)
    return term_metrics(total.sums, total.counts)
