"""The gradient of a batch: in microbatches, of both losses together or apart, weighed by a λ policy, compared."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.config import TrainConfig
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.diagnostics import as_metrics, diagnose
from vla_jax.objectives.transfusion import (
    Counts,
    Draws,
    Losses,
    Model,
    count,
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
from vla_jax.train.knobs import Knobs
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


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised: the losses of a model on a batch."""

    model: Model
    process: object
    config: TrainConfig
    knobs: Knobs | None = None
    """Values in place of the configuration's; None: the configuration's own, compiled in."""

    @property
    def action_weight(self) -> float | Float[Array, ""]:
        """λ. It is a plain 0 where the term is left out."""
        constant = self.config.objective.action_weight
        return constant if self.knobs is None or constant == 0 else self.knobs.action_weight

    @property
    def weighting(self) -> Weighting | None:
        """The λ policy; None where the loss is CE + λ · L(actions) with a constant λ."""
        return None if is_plain(self.config.objective) else policy_of(self.config, self.action_weight)

    def losses(
        self, params: PyTree, batch: Batch, draws: Draws, counts: Counts, weights: Pair | None = None
    ) -> Losses:
        """The Transfusion loss; `weights` of the two means default to 1 and λ."""
        if weights is None and self.knobs is not None:
            weights = Pair(1.0, self.action_weight)
        return transfusion_loss(
            self.model,
            self.process,
            self.config.objective,
            params,
            batch,
            draws,
            counts,
            target_tokens=self.config.data.max_target_tokens,
            action_targets=self.config.data.fast.max_targets or None,
            weights=weights,
            insulation=None if self.knobs is None else self.knobs.insulation,
        )

    def gradients(
        self,
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
        counts = count(batch, self.config.objective, draws)

        def loss(params: PyTree, batch: Batch, draws: Draws) -> tuple[Array, Losses]:
            losses = self.losses(params, batch, draws, counts, weights)
            return losses.total, losses

        def both(params: PyTree, batch: Batch, draws: Draws) -> tuple[Pair, Losses]:
            return per_loss(lambda p: self.losses(p, batch, draws, counts), params)

        gradient = both if apart else jax.grad(loss, has_aux=True)
        parts = self.config.train.accumulate
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

    def weighed(self, state: TrainState, batch: Batch, draws: Draws) -> Weighed:
        """The gradient as the λ policy wants it. The policy sees the losses in the configured reduction."""
        weighting = self.weighting
        if weighting is None:
            gradients, losses = self.gradients(state.params, batch, draws)
            return Weighed(gradients, losses, state.weighting, Pair(1.0, self.action_weight))
        objective = self.config.objective
        scale = reduction(batch, objective)
        if weighting.uses_gradients:
            pair, losses = self.gradients(state.params, batch, draws, apart=True)
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
                return self.gradients(state.params, batch, draws, weights=on_means)

            def text_only():
                alone = dataclasses.replace(
                    objective, action_weight=0.0, weighting=WeightingConfig(), diagnostics=DiagnosticsConfig()
                )
                one = dataclasses.replace(self, config=dataclasses.replace(self.config, objective=alone))
                return one.gradients(state.params, batch, draws, weights=Pair(scale.text, 0.0))

            # 0 · loss would let a NaN of the expert through, and would compute it.
            is_zero = weighting.is_zero(state.step) if weighting.can_be_zero else False
            gradients, losses = jax.lax.cond(is_zero, text_only, both) if weighting.can_be_zero else both()

        seen = Pair(scale.text * losses.text, scale.action * losses.action)
        total = weights.trunk.text * seen.text + weights.trunk.action * seen.action
        remembered = weighting.update(state.weighting, seen, products)
        if weighting.can_be_zero:  # not computed is not zero
            losses = losses._replace(action=jnp.where(is_zero, jnp.nan, losses.action))
        on_means = Pair(*(w * s for w, s in zip(weights.trunk, scale)))
        return Weighed(gradients, losses._replace(total=total), remembered, on_means)

    def diagnostics(self, state: TrainState, batch: Batch, draws: Draws, weights: Pair) -> Metrics:
        """The comparison of the two gradients before the update, in every n-th step; NaN in the others."""
        diagnostics = self.config.objective.diagnostics
        inside = trunk.inside(state.params, diagnostics.trunk, "objective.diagnostics.trunk")
        some = jax.tree.map(lambda x: x[:: diagnostics.stride], (batch, draws))  # every device keeps a part

        def losses(params: PyTree):
            return timed_losses(
                self.model,
                self.process,
                self.config.objective,
                params,
                *some,
                bins=diagnostics.time_bins,
                target_tokens=self.config.data.max_target_tokens,
                action_targets=self.config.data.fast.max_targets or None,
                insulation=None if self.knobs is None else self.knobs.insulation,
            )

        def compare() -> Metrics:
            return as_metrics(diagnose(losses, state.params, inside, weights))

        def nothing() -> Metrics:
            return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(compare))

        return jax.lax.cond((state.step + 1) % diagnostics.every == 0, compare, nothing)


def policy_of(config: TrainConfig, action_weight: float | Float[Array, ""] | None = None) -> Weighting:
    """The λ policy of a run; `action_weight` in place of the configuration's."""
    weight = config.objective.action_weight if action_weight is None else action_weight
    return make_weighting(config.objective.weighting, weight, config.train.steps)


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether the loss is CE + λ · L(actions) with a constant λ between means: no weight depends on anything."""
    reductions = (objective.text_reduction, objective.action_reduction)
    return objective.weighting.policy == "fixed" and reductions == ("mean", "mean")
