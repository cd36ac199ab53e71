"""Pallas splash attention on TPUs (jax.experimental.pallas.ops.tpu.splash_attention) under a prefix-LM mask.

Splash knows masks that are functions of (query, key) positions and that are compiled in. Ours differs from sample to
sample, but always has the form "every visible key up to `reach[query]`": the kernel hands each query's entry of an
array to the mask function, usually its position, and `reach` takes that place. Nothing of size [t s] is ever made.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.axes import mesh_axes

LANES = 128
"""Sequence lengths and blocks are multiples of it."""

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


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

    On a mesh every device runs the kernel on its own samples and heads, and its own queries where the logical axis
    `length` is split; on a CPU it is interpreted.
    """
    heads, groups = q.shape[2], k.shape[2]
    if groups > 1:  # one kernel call serves one key/value head, so each query head gets a copy of its own
        k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    q = (q * q.shape[-1] ** -0.5).astype(k.dtype)
    head_names = "act_heads" if groups > 1 else None
    run = _on_mesh(
        _attend,
        inputs=(
            ("batch", length, "act_heads", None),
            ("batch", "length", head_names, None),
            ("batch", "length", head_names, None),
            ("batch", "length"),
            ("batch", length),
        ),
        output=("batch", length, "act_heads", None),
    )
    return run(q, k, v, visible, reach.astype(jnp.int32))


def _attend(q, k, v, visible, reach):
    """One device's samples, queries and heads."""
    queries = q.shape[1]
    q, k, v, visible, reach = map(_pad, (q, k, v, visible, reach))

    def sample(interpret: bool, q, k, v, visible, reach):
        sees = kernel.SegmentIds(q=jnp.ones(reach.shape, jnp.int32), kv=visible.astype(jnp.int32))
        run: Any = _kernel(reach, q.shape[0], k.shape[0], interpret)
        if k.shape[1] == 1:
            out = run(q.swapaxes(0, 1), k[:, 0], v[:, 0], sees)
        else:
            one_head = jax.vmap(lambda q, k, v: run(q[None], k, v, sees)[0], in_axes=1)
            out = one_head(q, k, v)
        return out.swapaxes(0, 1)

    def batch(interpret: bool):
        return lambda *args: jax.vmap(lambda *one: sample(interpret, *one))(*args)

    out = jax.lax.platform_dependent(q, k, v, visible, reach, cpu=batch(True), default=batch(False))
    return out[:, :queries]


def _kernel(
    reach: Int[Array, " t"], queries: int, keys: int, interpret: bool
) -> kernel.SplashAttentionKernel:
    """The multi-query kernel whose query i sees keys up to `reach[i]`."""
    traced: Any = reach  # declared as NumPy's, but a traced array is taken as well
    info = MaskInfo(
        data_next=None, mask_next=None, block_mask=None, partial_mask_blocks=None, q_sequence=traced
    )
    block_q, block_kv = _block(queries, 1024), _block(keys, 512)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return kernel.SplashAttentionKernel(
        info,
        info,
        info,
        block_sizes=sizes,
        is_mqa=True,
        save_residuals=False,
        mask_value=MASKED,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="context",
        mask_function=_within_reach,
        interpret=interpret,
    )


def _within_reach(reach: Int[Array, "q s"], key: Int[Array, "q s"]) -> Bool[Array, "q s"]:
    return key <= reach


def _on_mesh(function: Callable, inputs: tuple, output: tuple) -> Callable:
    """`function` on each device's shards, as the logical axis names lie on the mesh that is set; itself without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return function

    specs = tuple(map(mesh_axes, inputs))
    return jax.shard_map(function, in_specs=specs, out_specs=mesh_axes(output), check_vma=False)


def _block(length: int, most: int) -> int:
    """The largest multiple of 128 that divides a length and is not above `most`."""
    return max(b for b in range(LANES, min(length, most) + 1, LANES) if length % b == 0)


def _pad(x: Array) -> Array:
    """Pads axis 1 to a multiple of 128, with zeros: invisible keys, queries that nobody reads."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2))
