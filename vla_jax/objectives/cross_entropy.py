"""Cross-entropy over a large vocabulary without ever holding all logits: in pieces of positions, computed again in the
backward pass. There is no one-hot, and what is no target has no logits at all: the callers gather each sample's targets
first. Only a sample with fewer of them than the bound of its batch computes some in vain, which are masked."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PIECE = 2**26
"""Most logits of one piece on a device: 256 MiB in float32, 261 positions of PaliGemma's vocabulary."""


class CrossEntropy(NamedTuple):
    """Sums over the valid labels."""

    loss: Float[Array, ""]
    """-log p(label)."""
    correct: Float[Array, ""]
    """How many labels are the likeliest token."""


def cross_entropy(
    logits_of: Callable[[Float[Array, "b c d"]], Float[Array, "b c v"]],
    hidden: Float[Array, "b g d"],
    labels: Int[Array, "b g"],
    valid: Bool[Array, "b g"],
) -> CrossEntropy:
    """What `logits_of(hidden)` says of the labels. Few logits are computed at once, many in pieces of g."""
    b, length, _ = hidden.shape
    piece = positions_at_once(b, jax.eval_shape(logits_of, hidden[:, :1]).shape[-1])
    if length <= piece:
        return _sums(logits_of(hidden), labels, valid)

    def split(x: Array) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -length % piece)
        x = jnp.pad(x, padding)
        return x.reshape(b, -1, piece, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(hidden, labels, valid):
        return _sums(logits_of(hidden), labels, valid)

    def add(total: CrossEntropy, inputs):
        return CrossEntropy(*map(jnp.add, total, one(*inputs))), None

    nothing = CrossEntropy(jnp.zeros(()), jnp.zeros(()))
    total, _ = jax.lax.scan(add, nothing, (split(hidden), split(labels), split(valid)))
    return total


def positions_at_once(rows: int, vocab: int) -> int:
    """Positions per row whose logits fit into a piece on each device of the mesh (which splits rows and vocabulary)."""
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    return max(1, PIECE * devices // (rows * vocab))


def _sums(
    logits: Float[Array, "b c v"], labels: Int[Array, "b c"], valid: Bool[Array, "b c"]
) -> CrossEntropy:
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    correct = (jnp.argmax(logits, axis=-1) == labels) & valid
    return CrossEntropy(jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(correct).astype(jnp.float32))
