"""The objective L = Σ λ_i · sum_i / count_i over named terms; of text and actions it is the Transfusion loss
CE(text) + λ · L(actions) (Zhou et al. 2024, arXiv:2408.11039, eq. 4).

    objective = Objective(model=model, process=process, config=config)
    drawn  = objective.draw(key, batch)                        # everything random, once for the whole batch
    counts = objective.counts(batch, drawn)                    # the denominators, of the whole batch
    losses = objective.losses(params, batch, drawn, counts)    # of the batch, or of a microbatch of it

Draws and denominators are those of the whole batch, so the loss does not depend on how the batch is split into
microbatches or over devices: microbatch losses and gradients simply add up. What the terms are: `terms/`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.flow.processes import Process
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.keys import named
from vla_jax.objectives.terms import TERMS, LossByTime, Model, Reading, TermSums, check_terms, names_of
from vla_jax.objectives.terms.base import zeros_like
from vla_jax.types import Batch, PyTree

Scalars = Mapping[str, float | Float[Array, ""]]
"""A number for each term, by name."""


class StepDraws(NamedTuple):
    """What is random in one step, drawn for the whole batch."""

    plan_visible: Bool[Array, " b"]
    """Whose expert may see the text target."""
    terms: dict[str, PyTree]
    """Each term's own, as its `draw` returns it."""


class Losses(NamedTuple):
    """A batch's losses, or a microbatch's share of them: all are sums over samples."""

    total: Float[Array, ""]
    """Σ λ_i · sum_i / count_i."""
    terms: dict[str, TermSums]
    """Zeros of a term that is not computed in this step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, of a model on a batch."""

    model: Model
    process: Process
    config: ObjectiveConfig
    target_tokens: int | None = None
    """Most text targets of one sample, so that logits exist for so many positions only; None: the length of a row."""
    action_targets: int | None = None
    """The same for the targets among a sample's action tokens."""
    insulation: float | Float[Array, ""] | None = None
    """κ in place of the configuration's, where it is traced."""

    def __post_init__(self):
        check_terms(self.config)

    @property
    def names(self) -> tuple[str, ...]:
        """The terms that are computed, in the order of `TERMS`."""
        return names_of(self.config)

    def draw(self, key: PRNGKeyArray, batch: Batch) -> StepDraws:
        """Everything random of a step; each purpose has a key of its own, found by its name."""
        visible = jax.random.bernoulli(
            named(key, "plan_visible"), self.config.plan_visible, batch.tokens.shape[:1]
        )
        own = {name: TERMS[name].draw(key, batch, self.process, self.config) for name in self.names}
        return StepDraws(visible, own)

    def counts(self, batch: Batch, drawn: StepDraws) -> dict[str, Float[Array, ""]]:
        """The denominators; at least 1, so that a batch without a modality has loss 0 there."""
        return {
            name: jnp.maximum(TERMS[name].count(batch, self.config, drawn.terms[name]), 1)
            for name in self.names
        }

    def scales(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """What turns the means into the configured reductions."""
        return {name: TERMS[name].scale(batch, self.config) for name in self.names}

    def losses(
        self,
        params: PyTree,
        batch: Batch,
        drawn: StepDraws,
        counts: Mapping[str, Float[Array, ""]],
        *,
        weights: Scalars | None = None,
        only: str | None = None,
    ) -> Losses:
        """The loss of a batch, or a microbatch's share of it.

        `weights` multiply the means (default: the configuration's λ). A term whose weight in the configuration is zero
        is not computed at all: 0 · loss would let its NaN through. With `only` one term is computed, and the others
        are zeros.
        """
        weights = {name: self.config.weight(name) for name in self.names} if weights is None else weights
        reading = self.read(params, batch, drawn)
        found, total = {}, jnp.zeros(())
        for name in self.names:
            sums = lambda name=name: TERMS[name].sums(reading, drawn.terms[name])  # noqa: E731
            if only not in (None, name):
                found[name] = zeros_like(jax.eval_shape(sums))
                continue
            found[name] = sums()
            total = total + weights[name] * (found[name].loss / counts[name])
        return Losses(total, found)

    def by_time(self, params: PyTree, batch: Batch, drawn: StepDraws, bins: int) -> dict[str, LossByTime]:
        """Each term's mean by `bins` of flow time: what `diagnostics.diagnose` differentiates."""
        reading, counts = self.read(params, batch, drawn), self.counts(batch, drawn)
        return {
            name: TERMS[name].by_time(reading, drawn.terms[name], counts[name], bins) for name in self.names
        }

    def read(self, params: PyTree, batch: Batch, drawn: StepDraws) -> Reading:
        """The backbone's pass over a batch, which all terms share."""
        context, hidden = self.model.apply({"params": params}, batch, drawn.plan_visible, method="prefill")
        return Reading(
            model=self.model,
            params=params,
            process=self.process,
            config=self.config,
            batch=batch,
            context=context,
            hidden=hidden,
            insulation=self.config.insulation if self.insulation is None else self.insulation,
            target_tokens=self.target_tokens,
            action_targets=self.action_targets,
        )


def term_metrics(
    terms: Mapping[str, TermSums], counts: Mapping[str, Float[Array, ""]]
) -> dict[str, Float[Array, "..."]]:
    """The reported form of the losses: ``<name>_loss``, the mean, and what each term adds to it."""
    found = {}
    for name in (name for name in TERMS if name in terms):
        found |= {f"{name}_loss": terms[name].loss / counts[name]}
        found |= TERMS[name].metrics(terms[name], counts[name])
    return found
