"""Where gradients are taken: of a batch in microbatches, of all losses together or apart, weighed by a λ policy."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.config import TrainConfig
from vla_jax.flow.processes import Process
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.diagnostics import as_metrics, diagnose
from vla_jax.objectives.objective import Losses, Objective, StepDraws, term_metrics
from vla_jax.objectives.terms import LossByTime, Model, names_of
from vla_jax.objectives.weighting import (
    Gram,
    Named,
    Weighting,
    Weights,
    combine,
    make_weighting,
    per_loss,
    trunk,
)
from vla_jax.train.knobs import Knobs
from vla_jax.train.state import TrainState
from vla_jax.types import Batch, PyTree

Metrics = dict[str, Float[Array, "..."]]
Lambdas = Mapping[str, float | Float[Array, "*cells"]]
"""λ of each term that is computed, by name, in the order of the terms."""


class Weighed(NamedTuple):
    """What a step's batch says about the parameters."""

    gradients: PyTree
    total: Float[Array, ""]
    metrics: Metrics
    """Metrics of the losses (`term_metrics`), and their weights, where those are not constants."""
    weighting: PyTree | None
    """The next state of the λ policy."""
    weights: Named
    """What multiplied the mean losses' gradients on the trunk."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised: the losses of a model on a batch."""

    model: Model
    process: Process
    config: TrainConfig
    knobs: Knobs | None = None
    """Values in place of the configuration's; None: the configuration's own, compiled in."""

    @property
    def objective(self) -> Objective:
        """The losses of this model, with κ from the knobs where there are any."""
        return Objective(
            model=self.model,
            process=self.process,
            config=self.config.objective,
            target_tokens=self.config.data.max_target_tokens,
            action_targets=self.config.data.fast.max_targets or None,
            insulation=None if self.knobs is None else self.knobs.insulation,
        )

    @property
    def lambdas(self) -> Lambdas:
        """λ of each term that is computed."""
        config, knobs = self.config.objective, self.knobs
        return {n: config.weight(n) if knobs is None else knobs.weights[n] for n in self.objective.names}

    def gradients(
        self,
        params: PyTree,
        batch: Batch,
        drawn: StepDraws,
        *,
        weights: Lambdas | None = None,
        only: str | None = None,
        apart: bool = False,
    ) -> tuple[PyTree, Losses]:
        """Gradient and losses of the whole batch, in `accumulate` microbatches.

        `weights` multiply the mean losses (default: λ); `only` one of them is computed; `apart`: a gradient of each, by
        name. Each microbatch's loss is its share of the batch's (the denominators are those of the batch), so shares
        and gradients add up, whatever the masks. Microbatches are strided: every device keeps a part of each.
        """
        objective = self.objective
        counts = objective.counts(batch, drawn)
        weights = self.lambdas if weights is None else weights

        def loss(params: PyTree, batch: Batch, drawn: StepDraws) -> tuple[Array, Losses]:
            losses = objective.losses(params, batch, drawn, counts, weights=weights, only=only)
            return losses.total, losses

        def each(params: PyTree, batch: Batch, drawn: StepDraws) -> tuple[dict[str, PyTree], Losses]:
            def means(params: PyTree) -> tuple[Named, Losses]:
                losses = objective.losses(params, batch, drawn, counts, weights=weights)
                return {name: found.loss / counts[name] for name, found in losses.terms.items()}, losses

            return per_loss(means, params)

        gradient = each if apart else jax.grad(loss, has_aux=True)
        parts = self.config.train.accumulate
        if parts == 1:
            return gradient(params, batch, drawn)

        def split(x: Array) -> Array:
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total: PyTree, microbatch: tuple[Batch, StepDraws]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

        microbatches = jax.tree.map(split, (batch, drawn))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], microbatches)),
        )
        total, _ = jax.lax.scan(add, zeros, microbatches)
        return total

    def weighed(self, state: TrainState, batch: Batch, drawn: StepDraws) -> Weighed:
        """The gradient as the λ policy wants it. The policy sees the losses in the configured reduction."""
        objective, lambdas = self.objective, self.lambdas
        counts = objective.counts(batch, drawn)
        if is_plain(self.config.objective):
            gradients, losses = self.gradients(state.params, batch, drawn)
            weights = {name: jnp.asarray(weight, jnp.float32) for name, weight in lambdas.items()}
            metrics = term_metrics(losses.terms, counts)
            return Weighed(gradients, losses.total, metrics, state.weighting, weights)

        policy, scales = policy_of(self.config, lambdas), objective.scales(batch)
        found = self._by_gradients if policy.uses_gradients else self._by_losses
        gradients, losses, weights, gram = found(policy, scales, state, batch, drawn)
        metrics = term_metrics(losses.terms, counts)
        seen = {name: scales[name] * metrics[f"{name}_loss"] for name in lambdas}
        total = sum(weights.trunk[name] * seen[name] for name in lambdas)
        on_means = {name: weights.trunk[name] * scales[name] for name in lambdas}
        remembered = policy.update(state.weighting, seen, gram)
        if policy.can_be_zero:
            metrics |= _not_computed(policy.is_zero(state.step), metrics, lambdas)
        metrics |= {f"{name}_weight": on_means[name] for name in lambdas}
        return Weighed(gradients, jnp.asarray(total), metrics, remembered, on_means)

    def _by_gradients(
        self, policy: Weighting, scales: Named, state: TrainState, batch: Batch, drawn: StepDraws
    ) -> tuple[PyTree, Losses, Weights, Gram]:
        """For a policy that compares gradients: one forward pass, a backward pass for each loss."""
        each, losses = self.gradients(state.params, batch, drawn, apart=True)
        each = {name: jax.tree.map(lambda g, s=scales[name]: s * g, tree) for name, tree in each.items()}
        inside = trunk.inside(
            state.params, self.config.objective.weighting.trunk, "objective.weighting.trunk"
        )
        gram = trunk.gram_matrix(each, policy.lambdas, inside)
        weights = policy.weights(state.step, state.weighting, gram)
        return combine(weights, each, inside), losses, weights, gram

    def _by_losses(
        self, policy: Weighting, scales: Named, state: TrainState, batch: Batch, drawn: StepDraws
    ) -> tuple[PyTree, Losses, Weights, None]:
        """For a policy whose weights are known before the backward pass: one of the weighted sum."""
        weights = policy.weights(state.step, state.weighting, None)
        on_means = {name: weights.trunk[name] * scales[name] for name in scales}

        def gradients(only: str | None = None) -> tuple[PyTree, Losses]:
            return self.gradients(state.params, batch, drawn, weights=on_means, only=only)

        if not policy.can_be_zero:
            return *gradients(), weights, None
        # 0 · loss would let a NaN of the expert through, and would compute it.
        zero = policy.is_zero(state.step)
        return *jax.lax.cond(zero, lambda: gradients("text"), gradients), weights, None

    def diagnostics(self, state: TrainState, batch: Batch, drawn: StepDraws, weights: Named) -> Metrics:
        """The comparison of the gradients before the update, in every n-th step; NaN in the others."""
        diagnostics = self.config.objective.diagnostics
        inside = trunk.inside(state.params, diagnostics.trunk, "objective.diagnostics.trunk")
        some = jax.tree.map(lambda x: x[:: diagnostics.stride], (batch, drawn))  # every device keeps a part
        in_order = {name: weights[name] for name in self.objective.names}

        def losses(params: PyTree) -> dict[str, LossByTime]:
            return self.objective.by_time(params, *some, bins=diagnostics.time_bins)

        def compare() -> Metrics:
            return as_metrics(diagnose(losses, state.params, inside, in_order))

        def nothing() -> Metrics:
            return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(compare))

        return jax.lax.cond((state.step + 1) % diagnostics.every == 0, compare, nothing)


def policy_of(config: TrainConfig, lambdas: Lambdas | None = None) -> Weighting:
    """The λ policy of a run; `lambdas` in place of the configuration's."""
    objective = config.objective
    given = {
        name: objective.weight(name) if lambdas is None else lambdas[name] for name in names_of(objective)
    }
    return make_weighting(objective.weighting, given, config.train.steps)


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is a sum of means with constant λ: no weight depends on anything."""
    reductions = (objective.text_reduction, objective.action_reduction)
    return objective.weighting.policy == "fixed" and reductions == ("mean", "mean")


def _not_computed(zero: Bool[Array, ""], metrics: Metrics, names: Lambdas) -> Metrics:
    """The losses that were left out of this step: NaN, because not computed is not zero."""
    others = [f"{name}_loss" for name in names if name != "text"]
    return {name: jnp.where(zero, jnp.nan, metrics[name]) for name in others}
