"""The terms of the objective by name. A new one is a file beside these and a line in `TERMS`.

Whether a term takes part is its weight's affair: 1 or 0 of ``text`` (`objective.text`), `objective.action_weight` of
``action``, `objective.weights` of every other.
"""

import difflib

from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.terms.action import ActionTerm
from vla_jax.objectives.terms.base import LossByTime, Model, Reading, Term, TermSums
from vla_jax.objectives.terms.text import TextTerm

__all__ = ["TERMS", "LossByTime", "Model", "Reading", "Term", "TermSums", "check_terms", "names_of"]

TERMS: dict[str, Term] = {
    "text": TextTerm(),
    "action": ActionTerm(),
}
"""Name → term, in the order in which losses and gradients are taken."""


def names_of(config: ObjectiveConfig) -> tuple[str, ...]:
    """The terms that a configuration asks for, in the order of `TERMS`."""
    return tuple(name for name in TERMS if name in config.asked)


def check_terms(config: ObjectiveConfig) -> None:
    """Raises ValueError where `objective.weights` names what is no term."""
    others = [name for name in TERMS if name not in ("text", "action")]
    for name, _ in config.weights:
        if name not in others:
            near = difflib.get_close_matches(name, others, n=1, cutoff=0)
            mend = f"; did you mean '{near[0]}'?" if near else "; there is none beside text and action"
            raise ValueError(f"objective.weights names '{name}', which is no term of the objective{mend}")
