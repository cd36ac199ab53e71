"""A matrix on its way into the compiled network, with LoRA's factors where it has them, in float32.

Whatever is done to inputs or outputs of W is done to those of A·B too, without ever adding A·B to W: what follows
rounds to bfloat16 or to 8-bit integers, and small entries of A·B would be lost in the sum (`layers/lora.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.linear import SUFFIX
from vla_jax.serve.compiled.quantize import Adapted, Kept


class Weight(NamedTuple):
    """w [*layers d *outputs], a [*layers d r], b [*layers r *outputs]; a and b None: no factors."""

    w: Float[Array, "..."]
    a: Float[Array, "..."] | None = None
    b: Float[Array, "..."] | None = None

    @classmethod
    def of(cls, tree: Mapping[str, Any], name: str) -> "Weight":
        """Parameter `name`, as it lies in the tree."""
        factors = tree.get(f"{name}{SUFFIX}", {})
        leaves = (tree[name], factors.get("a"), factors.get("b"))
        return cls(*(None if x is None else jnp.asarray(x, jnp.float32) for x in leaves))

    def scale_inputs(self, by: Float[Array, "*layers d"]) -> "Weight":
        """diag(by) · W."""

        def times(x: Array) -> Array:
            return x * by.reshape(*by.shape, *(1,) * (x.ndim - by.ndim))

        return Weight(times(self.w), None if self.a is None else times(self.a), self.b)

    def scale_outputs(self, by: float) -> "Weight":
        """W · by."""
        return Weight(self.w * by, self.a, None if self.b is None else self.b * by)

    def merged(self) -> Float[Array, "..."]:
        """W + A·B, for a product in float32."""
        if self.a is None:
            return self.w
        layers = "l" * (self.a.ndim - 2)
        return self.w + jnp.einsum(f"{layers}dr,{layers}r...->{layers}d...", self.a, self.b)

    def finish(self, keep: Callable[[Array], Kept], dtype: jnp.dtype, *, stacked: bool = True) -> Kept:
        """As it is kept: `keep` of W, layer by layer, and the factors in the network's type."""
        kept = (jax.vmap(keep) if stacked else keep)(self.w)
        return kept if self.a is None else Adapted(kept, self.a.astype(dtype), self.b.astype(dtype))


def heads_first(weight: Weight) -> Weight:
    """q_einsum [layers n d e] as [layers d n e]."""
    return weight._replace(w=jnp.moveaxis(weight.w, 1, 2))


def side_by_side(weight: Weight, axis: int) -> Weight:
    """A pair of matrices [layers 2 … d …], d at `axis`, as one [layers d 2 …]: their factors do not mix."""
    w = jnp.moveaxis(weight.w, axis, 1)
    if weight.a is None:
        return Weight(w)
    a = jnp.concatenate([weight.a[:, 0], weight.a[:, 1]], axis=-1)
    zero = jnp.zeros_like(weight.b[:, 0])
    first = jnp.stack([weight.b[:, 0], zero], axis=2)  # layers r 2 …
    second = jnp.stack([zero, weight.b[:, 1]], axis=2)
    return Weight(w, a, jnp.concatenate([first, second], axis=1))


def join_outputs(weight: Weight) -> Weight:
    """[layers d x y z] as [layers d x·y z]."""

    def join(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(*x.shape[:2], -1, x.shape[-1])

    return Weight(join(weight.w), weight.a, join(weight.b))


def join_inputs(weight: Weight) -> Weight:
    """[layers n e d] as [layers n·e d]."""

    def join(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(x.shape[0], -1, x.shape[-1])

    return Weight(join(weight.w), join(weight.a), weight.b)


def one_of(weight: Weight, i: int) -> Weight:
    """Number i of a pair [layers d 2 f]."""
    return Weight(weight.w[:, :, i], weight.a, None if weight.b is None else weight.b[:, :, i])


def concatenate(weights: Sequence[Weight]) -> Weight:
    """Matrices of the same inputs [layers d heads e], outputs one after the other."""
    w = jnp.concatenate([weight.w for weight in weights], axis=2)
    adapted = [weight for weight in weights if weight.a is not None]
    if not adapted:
        return Weight(w)
    a = jnp.concatenate([weight.a for weight in adapted], axis=-1)
    rows, before = [], 0
    for weight in weights:
        heads = weight.w.shape[2]
        if weight.b is not None:
            after = w.shape[2] - before - heads
            rows.append(jnp.pad(weight.b, ((0, 0), (0, 0), (before, after), (0, 0))))
        before += heads
    return Weight(w, a, jnp.concatenate(rows, axis=1))


def outputs_from(kept: Kept, start: int) -> Kept:
    """The heads from number `start` on of one layer's kept weight [d heads e]."""
    if isinstance(kept, Adapted):
        return Adapted(outputs_from(kept.base, start), kept.a, kept.b[..., start:, :])
    return jax.tree.map(lambda w: w[..., start:, :], kept)
