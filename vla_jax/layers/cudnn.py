"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

It takes bfloat16 and head widths that are multiples of 8, up to 128, on Hopper and later up to 256 (Gemma's). The mask
goes in as a bias [b 1 t s], the one array of that size that is left. Its backward pass cannot be mapped (`jax.vmap`) up
to JAX 0.11, so models that are trained side by side refuse it (`lab/train.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.axes import constrain


def attend(
    q: Float[Array, "b t n e"],
    k: Float[Array, "b s m e"],
    v: Float[Array, "b s m e"],
    visible: Bool[Array, "b s"],
    reach: Int[Array, "b t"],
    *,
    length: str = "length",
) -> Float[Array, "b t n e"]:
    """Attention of unscaled queries to the `visible` keys up to position `reach` of each query.

    Where the logical axis `length` is split, the queries are gathered: cuDNN takes whole sequences.
    """
    del length
    queries = q.shape[1]
    q = constrain(_even(q), ("batch", "length", "act_heads", None))
    reach = _even(reach)
    k, v, visible = _even(k), _even(v), _even(visible)  # padding is False: seen by nobody
    mask = (jnp.arange(k.shape[1]) <= reach[:, :, None]) & visible[:, None, :]
    return _flash(q, k, v, mask[:, None])[:, :queries]


def attend_all(
    q: Float[Array, "b t n e"], k: Float[Array, "b t n e"], v: Float[Array, "b t n e"]
) -> Float[Array, "b t n e"]:
    """Attention of everybody to everybody, without any mask."""
    return _flash(q, k, v, None)


def _flash(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _even(x: Array) -> Array:
    """Pads axis 1 to an even length, which the backward pass needs."""
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2))
