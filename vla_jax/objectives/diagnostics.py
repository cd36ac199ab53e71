"""What the losses do to the shared trunk: gradient norms, λ_eff, cosine and conflict, by layer and by flow time.

One forward pass; every loss is pulled back once, one with a flow time once per bin of t. Gradients are linear in the
loss, so such a loss's own gradient is the sum over its bins, and one bin is two cotangents in all. On a mesh every sum
is over whole arrays, wherever their shards lie.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.objectives.terms.base import LossByTime
from vla_jax.objectives.weighting import trunk
from vla_jax.objectives.weighting.per_loss import one_hot
from vla_jax.types import PyTree

STACKED = ("layers", "encoderblock")
"""Modules that are scanned over: their parameters carry the layers as first axis."""
TOWER = 3
"""Parameters outside them are grouped by this many parts of their path: ``backbone/llm/embedder``."""
UNNAMED = ("text", "action")
"""The pair whose comparison is logged without its names, as ``diagnostics/cosine``."""

Pair = tuple[str, str]
"""Two losses, in the order in which their gradients are taken."""
Grads = dict[str, Array]
"""A loss's gradient on the trunk, by path."""


class Beside(NamedTuple):
    """The gradient of one loss beside that of another, on the same parameters."""

    ratio: Float[Array, "..."]
    """λ_eff = ‖w_second g_second‖ / ‖w_first g_first‖; not finite where the first has no gradient."""
    cosine: Float[Array, "..."]
    """g_first · g_second / (‖g_first‖ ‖g_second‖); 0 where either is 0."""
    conflict: Float[Array, "..."]
    """Share of the parameters whose two derivatives have opposite signs."""


class Comparison(NamedTuple):
    """Some losses' gradients side by side, on the same parameters."""

    norms: dict[str, Float[Array, "..."]]
    """‖g‖ of each loss, without a weight."""
    pairs: dict[Pair, Beside]


class GradientReport(NamedTuple):
    """Comparisons on the whole trunk and by layer; of whole losses, and of each bin of t of those that have one."""

    whole: Comparison
    """Scalars; of every two losses."""
    layers: dict[str, Comparison]
    """Per group of parameters; `[layers]` for stacked ones, else scalars."""
    by_time: dict[str, Comparison]
    """Loss with a time → each of its bins, `[bins]`, beside the whole of every loss before it; NaN where no sample's t
    fell into a bin, which is not the same as a gradient of zero."""
    layers_by_time: dict[str, dict[str, Comparison]]
    """`[bins layers]` or `[bins]`; NaN like `by_time`."""


class _Sums(NamedTuple):
    """What comparisons are made of; sums over parameters."""

    squares: dict[str, Float[Array, "..."]]
    products: dict[Pair, Float[Array, "..."]]
    conflicts: dict[Pair, Float[Array, "..."]]


class _Group(NamedTuple):
    """Parameters that are compared together."""

    stacked: bool
    size: int
    """Their number; of stacked ones that of one layer."""
    paths: list[str]


def diagnose(
    losses: Callable[[PyTree], Mapping[str, LossByTime]],
    params: PyTree,
    inside: PyTree,
    weights: Mapping[str, float | Float[Array, ""]],
) -> GradientReport:
    """Compares the gradients of all losses at `params`, in the order of `weights`; losses without a time come first.

    **Arguments:**

    - `inside`: a tree of bools, True for the parameters of the trunk; see `weighting.trunk.inside`.
    - `weights`: what multiplies the losses, for λ_eff.
    """

    def values(params: PyTree) -> tuple[dict[str, Array], dict[str, Array]]:
        found = losses(params)
        return {n: p.mean for n, p in found.items()}, {n: p.share for n, p in found.items()}

    means, pull_back, shares = jax.vjp(values, params, has_aux=True)
    order = sorted(weights, key=lambda name: means[name].ndim)
    pairs = list(itertools.combinations(weights, 2))
    groups = _groups(trunk.chosen(params, inside))

    def gradient(name: str, cotangent: Array) -> Grads:
        all_of_them = one_hot(means, name) | {name: cotangent}
        return trunk.chosen(pull_back(all_of_them)[0], inside)

    whole: dict[str, Grads] = {}
    by_time: dict[str, dict[str, _Sums]] = {}
    for name in order:
        if not means[name].ndim:
            whole[name] = gradient(name, jnp.ones_like(means[name]))
            continue
        known = [pair for pair in pairs if name in pair and {*pair} <= {name, *whole}]

        def sums(g: Grads, name: str = name, known: list[Pair] = known) -> dict[str, _Sums]:
            return _sums(whole | {name: g}, known, groups)

        whole[name], by_time[name] = _over_bins(functools.partial(gradient, name), shares[name], sums)
    report = _compared(_sums(whole, pairs, groups), groups, weights, axis=0)
    timed = {name: _compared(sums, groups, weights, axis=1) for name, sums in by_time.items()}
    timed = {name: _drawn_only(found, shares[name]) for name, found in timed.items()}
    return GradientReport(*report, {n: f[0] for n, f in timed.items()}, {n: f[1] for n, f in timed.items()})


def as_metrics(report: GradientReport) -> dict[str, Array]:
    """A flat form for the log, vectors at most: ``diagnostics/[t2/][backbone/llm/layers/]cosine``.

    Norms have their loss's name (``text_norm``); ratio, cosine and conflict have the names of the two losses behind
    them (``cosine_text_depth``), but for text and action, which have none.
    """
    found = {f"diagnostics/{name}": value for name, value in _flat(report.whole).items()}
    for group, comparison in report.layers.items():
        found |= {f"diagnostics/{group}/{name}": value for name, value in _flat(comparison).items()}
    for timed, comparison in report.by_time.items():
        others = report.by_time.keys() - {timed}  # their norms do not depend on this loss's time
        found |= {f"diagnostics/{n}_by_time": v for n, v in _flat(comparison, others).items()}
        for group, of_group in report.layers_by_time[timed].items():
            for name, value in _flat(of_group, others).items():
                found |= {f"diagnostics/t{i}/{group}/{name}": row for i, row in enumerate(value)}
    return found


def group_of(path: str) -> tuple[str, bool]:
    """The group that a parameter is counted in, and whether its first axis is that of layers."""
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if part in STACKED), None)
    return ("/".join(parts[: at + 1]), True) if at is not None else ("/".join(parts[:TOWER]), False)


def _over_bins(
    gradient: Callable[[Array], Grads],
    share: Float[Array, " bins"],
    sums: Callable[[Grads], dict[str, _Sums]],
) -> tuple[Grads, dict[str, _Sums]]:
    """The gradient of a loss with a time, and `sums` of the gradient of each of its bins, `[bins …]`. One bin is done
    after the other, so that only one gradient is held at a time."""

    def one_bin(total: Grads, i: Array) -> tuple[Grads, dict[str, _Sums]]:
        g = gradient(jnp.zeros_like(share).at[i].set(1))
        total = jax.tree.map(lambda s, x: s + share[i] * x, total, g)
        return total, sums(g)

    shapes = jax.eval_shape(gradient, share)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(one_bin, nothing, jnp.arange(share.shape[0]))


def _groups(chosen: Mapping[str, Array]) -> dict[str, _Group]:
    """The trunk's parameters by group."""
    groups: dict[str, _Group] = {}
    for path, leaf in chosen.items():
        name, stacked = group_of(path)
        size, paths = (groups[name].size, groups[name].paths) if name in groups else (0, [])
        groups[name] = _Group(stacked, size + math.prod(leaf.shape[stacked:]), [*paths, path])
    return groups


def _sums(
    gradients: Mapping[str, Grads], pairs: Sequence[Pair], groups: Mapping[str, _Group]
) -> dict[str, _Sums]:
    """Per group; `[layers]` where the parameters are stacked."""

    def of_group(group: _Group) -> _Sums:
        def total(value: Callable[..., Array], *names: str) -> Array:
            found = []
            for path in group.paths:
                x = value(*(gradients[name][path] for name in names))
                found.append(jnp.sum(x, axis=tuple(range(group.stacked, x.ndim))))
            return functools.reduce(operator.add, found)

        return _Sums(
            {name: total(jnp.square, name) for name in gradients},
            {pair: total(operator.mul, *pair) for pair in pairs},
            {pair: total(_opposite, *pair) for pair in pairs},
        )

    return {name: of_group(group) for name, group in groups.items()}


def _opposite(a: Array, b: Array) -> Array:
    return (jnp.sign(a) * jnp.sign(b) < 0).astype(jnp.float32)


def _compared(
    sums: Mapping[str, _Sums],
    groups: Mapping[str, _Group],
    weights: Mapping[str, float | Float[Array, ""]],
    axis: int,
) -> tuple[Comparison, dict[str, Comparison]]:
    """On the whole trunk and by group; `axis` is that of the layers, where there is one."""

    def over_layers(x: Array) -> Array:
        return jnp.sum(x, axis=axis) if x.ndim > axis else x

    def layers(name: str) -> int:
        x = next(iter(sums[name].squares.values()))
        return x.shape[axis] if x.ndim > axis else 1

    added = [jax.tree.map(over_layers, of_group) for of_group in sums.values()]
    whole = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), added)
    size = sum(group.size * layers(name) for name, group in groups.items())
    by_group = {name: _comparison(of_group, groups[name].size, weights) for name, of_group in sums.items()}
    return _comparison(whole, size, weights), by_group


def _comparison(sums: _Sums, size: int, weights: Mapping[str, float | Float[Array, ""]]) -> Comparison:
    norms = {name: jnp.sqrt(square) for name, square in sums.squares.items()}

    def beside(pair: Pair) -> Beside:
        first, second = pair
        both = norms[first] * norms[second]
        return Beside(
            ratio=weights[second] * norms[second] / (weights[first] * norms[first]),
            cosine=jnp.where(both > 0, sums.products[pair] / jnp.where(both > 0, both, 1), 0),
            conflict=sums.conflicts[pair] / size,
        )

    return Comparison(norms, {pair: beside(pair) for pair in sums.products})


def _drawn_only(found: PyTree, share: Float[Array, " bins"]) -> PyTree:
    """NaN for the bins that hold no sample."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(share > 0, range(1, x.ndim)), x, jnp.nan), found)


def _flat(comparison: Comparison, without: Set[str] = frozenset()) -> dict[str, Array]:
    """The numbers of a comparison by their names in the log, `without` the norms of some losses."""
    found = {f"{name}_norm": norm for name, norm in comparison.norms.items() if name not in without}
    for pair, beside in comparison.pairs.items():
        found |= {pair_name(name, pair): value for name, value in beside._asdict().items()}
    return found


def pair_name(name: str, pair: Pair) -> str:
    """How ratio, cosine or conflict of two losses is called in the log."""
    return name if pair == UNNAMED else "_".join([name, *pair])
