"""Cross-entropy over a large vocabulary without ever holding all logits: in pieces of positions, computed again in the
backward pass. There is no one-hot, and what is no target has no logits at all: the callers gather each sample's targets
first. Only a sample with fewer of them than the bound of its batch computes some in vain, which are masked.

On a mesh the devices that share the table share the vocabulary: they exchange columns for rows once, and each computes
the logits of its tokens for the samples of all of them. So a piece exchanges its few hidden vectors; were the logits
split by samples, every piece would gather the table and sum its gradient, which for PaliGemma are 2 GB each.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.axes import mesh_axes

PIECE = 2**26
"""Most logits of one piece on a device: 256 MiB in float32, 261 positions of PaliGemma's vocabulary."""


class CrossEntropy(NamedTuple):
    """Sums over the valid labels."""

    loss: Float[Array, ""]
    """Sum of -log p(label) in nats."""
    correct: Float[Array, ""]
    """How many labels are the likeliest token."""


class Split(NamedTuple):
    """Mesh axes, those of several devices: over which the samples lie, the table's rows, and its columns."""

    samples: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def vocab(self) -> tuple[str, ...]:
        """Over which the tokens lie once columns have been exchanged for rows."""
        return self.rows + self.columns

    @property
    def shared(self) -> tuple[str, ...]:
        """Whose devices have samples and tokens of their own, and so exchange samples."""
        return tuple(axis for axis in self.samples if axis in self.vocab)


class Tokens(NamedTuple):
    """A device's part of the vocabulary."""

    table: Float[Array, "w d"]
    start: Int[Array, ""] | int = 0
    """Token id of the first row."""
    count: Int[Array, ""] | None = None
    """How many they are; None: w, none of them fills up."""


def cross_entropy(
    table: Float[Array, "v d"],
    hidden: Float[Array, "b g d"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"],
) -> CrossEntropy:
    """What the logits hidden · tableᵀ (float32) say of the labels. Few are computed at once, many in pieces of g."""
    mesh = jax.sharding.get_abstract_mesh()
    split = _split(mesh, hidden.shape[0])
    if split is None:
        return _in_pieces(Tokens(table), hidden, labels, valid, Split())
    samples = P(split.samples)
    run = jax.shard_map(
        partial(_on_device, split=split),
        in_specs=(P(split.rows, split.columns), samples, samples, samples),
        out_specs=P(),
    )
    return run(table, hidden, labels, valid)


def positions_at_once(rows: int, vocab: int) -> int:
    """Positions per row whose logits fit into a piece."""
    return max(1, PIECE // (rows * vocab))


def _split(mesh: jax.sharding.AbstractMesh, samples: int) -> Split | None:
    """As the rules say; None on one device, and for so few samples that they lie on every device."""
    if not nn.get_logical_axis_rules() or mesh.empty or mesh.size == 1:
        return None
    split = Split(
        *(
            tuple(axis for axis in _spec_axes(spec) if mesh.shape[axis] > 1)
            for spec in (mesh_axes(("batch",)), mesh_axes(("vocab",)), mesh_axes(("embed",)))
        )
    )
    return None if samples % _devices(mesh, split.samples) else split


def _spec_axes(spec: P) -> tuple[str, ...]:
    """The mesh axes of a spec of one entry."""
    (axes,) = spec
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _devices(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _on_device(table, hidden, labels, valid, *, split: Split) -> CrossEntropy:
    """One device's part of the table and its samples; the sums are everybody's."""
    # From here on every device counts its own table, so that its gradient is summed once, not in each piece.
    table = jax.lax.pcast(
        table, tuple(axis for axis in split.samples if axis not in split.vocab), to="varying"
    )
    found = _in_pieces(_rows_for_columns(table, split), hidden, labels, valid, split)
    return CrossEntropy(*(jax.lax.psum(total, split.samples) for total in found))


def _rows_for_columns(table: Float[Array, "r c"], split: Split) -> Tokens:
    """Whole rows, fewer of them."""
    rows, (index, parts) = table.shape[0], _index_and_count(split.columns)
    each = -(-rows // parts)
    if split.columns:
        table = jnp.pad(table, ((0, each * parts - rows), (0, 0)))
        table = jax.lax.all_to_all(table, split.columns, split_axis=0, concat_axis=1, tiled=True)
    start = _index_and_count(split.rows)[0] * rows + index * each
    return Tokens(table, start, jnp.clip(rows - index * each, 0, each) if rows % parts else None)


def _index_and_count(axes: tuple[str, ...]) -> tuple[Int[Array, ""] | int, int]:
    """Which of how many devices this is."""
    return (jax.lax.axis_index(axes), jax.lax.axis_size(axes)) if axes else (0, 1)


def _in_pieces(
    tokens: Tokens,
    hidden: Float[Array, "b g d"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"],
    split: Split,
) -> CrossEntropy:
    b, length, _ = hidden.shape
    piece = positions_at_once(b * _index_and_count(split.shared)[1], tokens.table.shape[0])
    if length <= piece:
        return _sums(tokens, hidden, labels, valid, split)

    def cut(x: Array) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -length % piece)
        x = jnp.pad(x, padding)
        return x.reshape(b, -1, piece, *x.shape[2:]).swapaxes(0, 1)

    one = jax.checkpoint(partial(_sums, split=split))

    def add(total: CrossEntropy, inputs):
        return CrossEntropy(*map(jnp.add, total, one(tokens, *inputs))), None

    nothing = jnp.zeros(())
    if split.samples:
        nothing = jax.lax.pcast(nothing, split.samples, to="varying")
    total, _ = jax.lax.scan(add, CrossEntropy(nothing, nothing), (cut(hidden), cut(labels), cut(valid)))
    return total


def _sums(
    tokens: Tokens,
    hidden: Float[Array, "b c d"],
    labels: Int[Array, "b c"],
    valid: Bool[Array, "b c"],
    split: Split,
) -> CrossEntropy:
    """Over one piece of this device's samples."""
    wanted = labels
    if split.shared:
        hidden, wanted = (jax.lax.all_gather(x, split.shared, tiled=True) for x in (hidden, labels))
    table = tokens.table.astype(hidden.dtype)
    logits = jnp.einsum("bcd,vd->bcv", hidden, table, preferred_element_type=jnp.float32)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    if tokens.count is not None:
        logits = jnp.where(places < tokens.count, logits, -jnp.inf)

    def over_all(collective, x: Array) -> Array:
        return collective(x, split.vocab) if split.vocab else x

    here = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    most = over_all(jax.lax.pmax, here)
    normaliser = jnp.log(over_all(jax.lax.psum, jnp.sum(jnp.exp(logits - most[..., None]), axis=-1))) + most
    at = wanted - tokens.start
    at = at if tokens.count is None else jnp.where(at < tokens.count, at, -1)
    chosen = jnp.sum(jnp.where(places == at[..., None], logits, 0), axis=-1)
    loss = normaliser - over_all(jax.lax.psum, chosen)
    first = tokens.start + jnp.argmax(logits, axis=-1)
    first = jnp.where(here == most, first, jnp.iinfo(jnp.int32).max)
    right = over_all(jax.lax.pmin, first) == wanted
    if split.shared:  # from the samples of all to one's own
        mine = jax.lax.axis_index(split.shared) * labels.shape[0]
        loss, right = (jax.lax.dynamic_slice_in_dim(x, mine, labels.shape[0]) for x in (loss, right))
    return CrossEntropy(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(right & valid).astype(jnp.float32))
