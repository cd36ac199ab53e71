"""The losses of a batch by name, as tests look at them: means of text and actions, and what is reported of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from vla_jax.objectives.objective import Losses, Objective


class Found(NamedTuple):
    total: Any
    text: Any
    action: Any
    text_accuracy: Any
    time_histogram: Any
    action_by_time: Any
    elements_by_time: Any


def losses_of(objective: Objective, params, batch, drawn, counts, **options) -> Found:
    return found(objective.losses(params, batch, drawn, counts, **options), counts)


def found(losses: Losses, counts) -> Found:
    """Zeros where a term is not computed, None where it reports nothing."""
    means = {name: sums.loss / counts[name] for name, sums in losses.terms.items()}
    text, action = ((losses.terms[n].reported if n in losses.terms else {}) for n in ("text", "action"))
    return Found(
        losses.total,
        means.get("text", jnp.zeros(())),
        means.get("action", jnp.zeros(())),
        text["correct"] / counts["text"] if text else jnp.zeros(()),
        *(action.get(name) for name in ("draws", "error", "elements")),
    )
