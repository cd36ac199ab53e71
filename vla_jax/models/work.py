"""What the parts of a model cost, read off their own trace: no formula of an architecture stands anywhere.

A multiply-add is 2 FLOPs; products of matrices and convolutions are counted, attention whole (every query with every
key, as a prefix-LM computes it). A scan's body counts as often as it runs, which XLA's own count does not know, and
only what the results depend on is counted: XLA leaves out the rest.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.extend import core

from vla_jax.models.abstract import abstract_batch, abstract_params
from vla_jax.models.config import VLAConfig
from vla_jax.models.stack import unstacked
from vla_jax.models.vla import VLA
from vla_jax.types import Batch, Given, PyTree


class Traced(NamedTuple):
    """What a function does, of its trace."""

    flops: int
    read: Any
    """Its arguments, with whether each array was read in place of the array."""
    shapes: Any
    """Its result, as shapes."""


def trace(function: Callable[..., Any], *args: Any) -> Traced:
    """Of a function of arrays or shapes. Raises ValueError for products in a loop whose length is not known."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    flops, read = _walk(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return Traced(flops, jax.tree.unflatten(jax.tree.structure(args), read), shapes)


def _walk(jaxpr: core.Jaxpr, needed: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of what the needed results depend on, and which inputs that reads."""
    live = {v for v, n in zip(jaxpr.outvars, needed) if n and not isinstance(v, core.Literal)}
    flops = 0
    for eqn in reversed(jaxpr.eqns):
        wanted = [v in live for v in eqn.outvars]
        if not any(wanted):
            continue
        found, read = _equation(eqn, wanted)
        flops += found
        live |= {v for v, r in zip(eqn.invars, read) if r and not isinstance(v, core.Literal)}
    return flops, [v in live for v in jaxpr.invars]


def _equation(eqn: core.JaxprEqn, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of one equation, and which of its inputs it reads."""
    name, params = eqn.primitive.name, eqn.params
    everything = [True] * len(eqn.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(_shape(eqn.invars[0])[i] for i in contracted)
        return 2 * depth * math.prod(_shape(eqn.outvars[0])), everything
    if name == "conv_general_dilated":
        kernel = _shape(eqn.invars[1])
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(kernel) // outputs * math.prod(_shape(eqn.outvars[0])), everything
    if name == "scan":
        carried = [True] * params["num_carry"]
        flops, read = _walk(params["jaxpr"].jaxpr, carried + list(wanted[len(carried) :]))
        return params["length"] * flops, read
    if name == "cond":
        branches = [_walk(branch.jaxpr, wanted) for branch in params["branches"]]
        read = [any(used) for used in zip(*(used for _, used in branches))]
        return max(flops for flops, _ in branches), [True, *read]
    inner = [getattr(value, "jaxpr", value) for value in params.values()]
    inner = [value for value in inner if isinstance(value, core.Jaxpr)]
    if len(inner) == 1 and len(inner[0].invars) == len(everything) and len(inner[0].outvars) == len(wanted):
        return _walk(inner[0], wanted)  # jit, remat, custom derivatives: the call of a function
    if any(_walk(part, [True] * len(part.outvars))[0] for part in inner):
        raise ValueError(f"FLOPs of {name} cannot be counted: how often it runs is not known before it does")
    return 0, everything


def _shape(operand: Any) -> tuple[int, ...]:
    return operand.aval.shape


class Flops(NamedTuple):
    """Forward FLOPs of one sample, by part."""

    vision: int
    """All cameras through the encoder."""
    prefix: int
    """The rest of the backbone's pass."""
    logits: int
    """The output layer at the text targets."""
    expert: int
    """One evaluation of the expert over one chunk; 0 where there is none."""
    chunk_tokens: int
    """The chunk as FAST tokens through the language model, with their logits."""

    def chunk(self, evaluations: int) -> int:
        """Sampling one chunk: the prefix once, the expert `evaluations` times; no text is decoded."""
        return self.vision + self.prefix + evaluations * self.expert


class Work(NamedTuple):
    """Of one part of a served call."""

    flops: int
    weights: int
    """Numbers of all matrices that it reads; tables, of which it looks up a few rows, are left out."""
    context: int
    """Numbers of keys, values and features that it leaves (the prefix) or reads."""


def plain(config: VLAConfig) -> VLAConfig:
    """The same network as it is counted: nothing computed twice, no kernel whose products a trace does not show."""
    return dataclasses.replace(config, remat="none", attention="xla", unroll=1)


@functools.cache
def forward(
    config: VLAConfig,
    *,
    text_tokens: int,
    target_tokens: int = 0,
    chunk_tokens: int = 0,
    chunk_targets: int = 0,
) -> Flops:
    """Of a model whose sizes are all known.

    `text_tokens` is the padded length of the text, `target_tokens` at how many positions logits are computed,
    `chunk_tokens` the padded length of a chunk as tokens, of which `chunk_targets` have logits.
    """
    config = plain(config)
    params, batch, call = _parts(config, meta.unbox(abstract_params(config)), text_tokens)
    vision = trace(call("encode_images"), params, batch).flops
    prefill = trace(call("prefill"), params, batch)
    context, hidden = prefill.shapes
    evaluation = logits = chunk = 0
    if config.expert.is_network:
        evaluation = trace(call("denoise"), params, context, Given.of(batch), batch.actions, _times(1)).flops
    if config.backbone.has_text:
        outputs = lambda count: jax.ShapeDtypeStruct((1, count, hidden.shape[-1]), hidden.dtype)  # noqa: E731
        logits = trace(call("logits"), params, outputs(target_tokens)).flops
        if chunk_tokens:
            tokens = abstract_batch(config, chunk_tokens=chunk_tokens)
            written = tokens.action_tokens, tokens.action_token_mask
            chunk = trace(call("extend"), params, context, *written).flops
            chunk += trace(call("logits"), params, outputs(chunk_targets)).flops
    return Flops(vision, prefill.flops - vision, logits, evaluation, chunk)


@functools.cache
def served(config: VLAConfig, *, text_tokens: int, rows: int = 1, samples: int = 1) -> dict[str, Work]:
    """Vision, prefill and one evaluation of the expert (denoise) of a call for `rows` observations.

    As a served program computes them: layers lie apart, so that what nobody reads of the last one is left out; what
    the time adds is known before the call; what all evaluations have in common is part of the prefill.
    """
    config = plain(config)
    params = jax.eval_shape(unstacked, meta.unbox(abstract_params(config)))
    params, batch, call = _parts(config, params, text_tokens, rows)
    given = Given.of(batch)

    def prefill(params: PyTree, batch: Batch, given: Given) -> Any:
        return call("prepare")(params, call("prefill")(params, batch)[0], given)

    drawn = abstract_batch(config, rows=rows * samples)
    first, told = trace(prefill, params, batch, given), trace(call("condition"), params, _times(1)).shapes
    context, prepared = first.shapes
    prepared = jax.tree.map(lambda x: _rows(x, rows * samples), prepared)
    last = trace(call("denoise"), params, context, prepared, drawn.actions, told)
    seen = trace(call("encode_images"), params, batch)
    kept = _size(context, last.read[1], of=_is_number)
    weights = [_size(params, part.read[0], of=_matrices(config)) for part in (seen, first, last)]
    return {
        "vision": Work(seen.flops, weights[0], 0),
        "prefill": Work(first.flops - seen.flops, weights[1] - weights[0], kept),
        "denoise": Work(last.flops, weights[2], kept),
    }


def _parts(
    config: VLAConfig, params: PyTree, text_tokens: int, rows: int = 1
) -> tuple[PyTree, Batch, Callable[[str], Callable[..., Any]]]:
    """Parameters and a batch as shapes, and the model's methods as functions of parameters."""
    model = VLA(config)

    def call(method: str) -> Callable[..., Any]:
        return lambda params, *args: model.apply({"params": params}, *args, method=method)

    return params, abstract_batch(config, rows=rows, text_tokens=text_tokens), call


def _times(rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows,), jnp.float32)


def _rows(x: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)


def _is_number(path: str, leaf: Any) -> bool:
    del path
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _matrices(config: VLAConfig) -> Callable[[str, Any], bool]:
    """Whether a parameter is read whole: all but the backbone's tables."""
    tables = {f"backbone/{table}" for table in config.backbone.tables}
    return lambda path, leaf: path not in tables


def _size(tree: PyTree, read: PyTree, *, of: Callable[[str, Any], bool]) -> int:
    """Numbers in those arrays of a tree that are read, and that `of` names."""
    leaves = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(read))
    return sum(
        math.prod(leaf.shape)
        for (path, leaf), used in leaves
        if used and of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    )
