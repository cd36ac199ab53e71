"""How states of policies that keep a value for each loss but one are saved.

With two losses that is one value, which checkpoints hold by itself; with more of them it has names.
"""

from collections.abc import Sequence

from vla_jax.objectives.weighting.base import Named, Scalar


def bare(values: Named) -> Scalar | Named:
    """The only value without its name, or all of them with theirs."""
    (first, *others) = values.values()
    return values if others else first


def with_names(saved: Scalar | Named, names: Sequence[str]) -> Named:
    """By name, whether it was saved so or, with one weighted loss, as a bare number."""
    return saved if isinstance(saved, dict) else dict(zip(names, [saved], strict=True))
