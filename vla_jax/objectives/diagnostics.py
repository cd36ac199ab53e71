"""What the two losses do to the shared trunk: gradient norms, λ_eff, cosine and conflict, by layer and by flow time.

One forward pass; the text loss is pulled back once, the action loss once per bin of t. Gradients are linear in the
loss, so the action loss's own gradient is the sum over the bins, and one bin is two cotangents in all. On a mesh
every sum is over whole arrays, wherever their shards lie.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.objectives.weighting import trunk
from vla_jax.objectives.weighting.base import Pair

STACKED = ("layers", "encoderblock")
"""Modules that are scanned over: their parameters carry the layers as first axis."""
TOWER = 3
"""Parameters outside them are grouped by this many parts of their path: ``backbone/llm/embedder``."""


class TimedLosses(NamedTuple):
    """What is differentiated: the text loss, the mean action loss of each bin of t, and the bin's share of elements."""

    text: Float[Array, ""]
    action: Float[Array, " bins"]
    share: Float[Array, " bins"]


class Comparison(NamedTuple):
    """Two gradients side by side, on the same parameters."""

    text_norm: Float[Array, "..."]
    """‖g_text‖, without a weight."""
    action_norm: Float[Array, "..."]
    """‖g_action‖, without a weight."""
    ratio: Float[Array, "..."]
    """λ_eff = ‖w_action g_action‖ / ‖w_text g_text‖; not finite where the text has no gradient."""
    cosine: Float[Array, "..."]
    """g_text · g_action / (‖g_text‖ ‖g_action‖); 0 where either is 0."""
    conflict: Float[Array, "..."]
    """Share of the parameters whose two derivatives have opposite signs."""


class Report(NamedTuple):
    """Comparisons on the whole trunk and by layer; of the whole action loss and of each bin of its t."""

    whole: Comparison
    """Scalars."""
    layers: dict[str, Comparison]
    """Per group of parameters; `[layers]` for stacked ones, else scalars."""
    by_time: Comparison
    """`[bins]`; NaN where no sample's t fell into a bin, which is not the same as a gradient of zero."""
    layers_by_time: dict[str, Comparison]
    """`[bins layers]` or `[bins]`; NaN like `by_time`."""


class _Sums(NamedTuple):
    """What the comparisons are made of; sums over parameters."""

    text: Float[Array, "..."]
    action: Float[Array, "..."]
    both: Float[Array, "..."]
    conflicts: Float[Array, "..."]
    size: int


def diagnose(
    losses: Callable[[Any], TimedLosses], params: Any, inside: Any, weights: Pair = Pair(1.0, 1.0)
) -> Report:
    """Compares the gradients of both losses at `params`.

    **Arguments:**

    - `inside`: a tree of bools, True for the parameters of the trunk; see `weighting.trunk.inside`.
    - `weights`: what multiplies the two losses, for λ_eff only.
    """

    def values(params):
        found = losses(params)
        return (found.text, found.action), found.share

    (text, action), pull_back, share = jax.vjp(values, params, has_aux=True)
    g_text = trunk.chosen(pull_back((jnp.ones_like(text), jnp.zeros_like(action)))[0], inside)

    def one_bin(total, i):
        cotangent = jnp.zeros_like(action).at[i].set(1)
        g = trunk.chosen(pull_back((jnp.zeros_like(text), cotangent))[0], inside)
        total = jax.tree.map(lambda s, x: s + share[i] * x, total, g)
        return total, _without_size(_sums(g_text, g))

    nothing = jax.tree.map(jnp.zeros_like, g_text)
    g_action, by_time = jax.lax.scan(one_bin, nothing, jnp.arange(action.shape[0]))
    at_once = _sums(g_text, g_action)
    by_time = {name: sums._replace(size=at_once[name].size) for name, sums in by_time.items()}

    def compare(sums: dict[str, _Sums], axis: int) -> tuple[Comparison, dict[str, Comparison]]:
        whole = _compare(_add([_over_layers(s, axis) for s in sums.values()]), weights)
        return whole, {name: _compare(s, weights) for name, s in sums.items()}

    def drawn(x: Float[Array, "bins ..."]) -> Float[Array, "bins ..."]:
        return jnp.where(jnp.expand_dims(share > 0, range(1, x.ndim)), x, jnp.nan)

    return Report(*compare(at_once, 0), *jax.tree.map(drawn, compare(by_time, 1)))


def as_metrics(report: Report) -> dict[str, Array]:
    """A flat form for the log, vectors at most: ``diagnostics/[t2/][backbone/llm/layers/]cosine``."""
    found = {f"diagnostics/{name}": value for name, value in report.whole._asdict().items()}
    found |= {f"diagnostics/{name}_by_time": value for name, value in report.by_time._asdict().items()}
    for group, comparison in report.layers.items():
        found |= {f"diagnostics/{group}/{name}": value for name, value in comparison._asdict().items()}
    for group, comparison in report.layers_by_time.items():
        for name, value in comparison._asdict().items():
            found |= {f"diagnostics/t{i}/{group}/{name}": row for i, row in enumerate(value)}
    return found


def group_of(path: str) -> tuple[str, bool]:
    """The group that a parameter is counted in, and whether its first axis is that of layers."""
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if part in STACKED), None)
    return ("/".join(parts[: at + 1]), True) if at is not None else ("/".join(parts[:TOWER]), False)


def _sums(text: dict[str, Array], action: dict[str, Array]) -> dict[str, _Sums]:
    """Per group; `[layers]` where the parameters are stacked."""
    groups: dict[str, list[_Sums]] = {}
    for path, g_text in text.items():
        group, stacked = group_of(path)
        g_action = action[path]
        total = functools.partial(jnp.sum, axis=tuple(range(stacked, g_text.ndim)))
        size = math.prod(g_text.shape[stacked:])
        product = g_text * g_action
        opposite = (jnp.sign(g_text) * jnp.sign(g_action) < 0).astype(jnp.float32)
        sums = _Sums(total(g_text**2), total(g_action**2), total(product), total(opposite), size)
        groups.setdefault(group, []).append(sums)
    return {group: _add(found) for group, found in groups.items()}


def _add(sums: list[_Sums]) -> _Sums:
    return _Sums(*(functools.reduce(operator.add, parts) for parts in zip(*sums)))


def _without_size(sums: dict[str, _Sums]) -> dict[str, _Sums]:
    return {name: s._replace(size=0) for name, s in sums.items()}


def _over_layers(sums: _Sums, axis: int) -> _Sums:
    """Sums over the layers, whose axis is `axis` where there is one."""
    layers = sums.text.shape[axis] if sums.text.ndim > axis else 1
    arrays = (jnp.sum(x, axis=axis) if x.ndim > axis else x for x in sums[:4])
    return _Sums(*arrays, sums.size * layers)


def _compare(sums: _Sums, weights: Pair) -> Comparison:
    text, action = jnp.sqrt(sums.text), jnp.sqrt(sums.action)
    norms = text * action
    return Comparison(
        text_norm=text,
        action_norm=action,
        ratio=weights.action * action / (weights.text * text),
        cosine=jnp.where(norms > 0, sums.both / jnp.where(norms > 0, norms, 1), 0),
        conflict=sums.conflicts / sums.size,
    )
