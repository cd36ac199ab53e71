"""The model written a second time: one attention over prefix and suffix, without caches, in a few dozen lines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.models.vla import VLA


def joint_forward(cfg, params, data, x_t, t):
    """Prefix, state and actions in one attention, written without caches: two weight sets, one softmax."""
    model = VLA(cfg)
    bound = model.bind({"params": params})
    prefix, _ = bound.backbone._embed(data)
    data = jax.tree.map(np.asarray, data)  # masks and positions are numpy's, also while this is traced
    present = np.repeat(
        np.stack([data.image_mask[n] for n in cfg.cameras], 1), cfg.backbone.vision.tokens, axis=1
    )
    prefix_mask = np.concatenate([present, data.token_mask], 1)
    p = params["expert"]

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def embed(t):
        # Angles reach 1570 rad, where float32 keeps four decimals: the same rounding is part of the definition.
        period = 4e-3 * 1000.0 ** jnp.linspace(0, 1, cfg.expert.width // 2)
        angle = 2 * jnp.pi * t[..., None] / period
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)

    b, k = x_t.shape[:2]
    steps = np.asarray(data.action_mask).any(-1, keepdims=True)
    x_t = jnp.where(data.action_mask if cfg.expert.padding == "zero" else steps, x_t, 0)
    times = jnp.concatenate([jnp.ones((b, 1)), jnp.broadcast_to(t[:, None], (b, k))], 1)
    actions, condition = dense("action_in_proj", x_t), None
    if cfg.expert.time == "adarms":
        condition = nn.swish(dense("time_mlp_out", nn.swish(dense("time_mlp_in", embed(times)))))
    else:
        actions = dense("action_time_mlp_in", jnp.concatenate([actions, embed(times[:, 1:])], -1))
        actions = dense("action_time_mlp_out", nn.swish(actions))
    suffix = jnp.concatenate([dense("state_proj", data.state)[:, None], actions], 1)

    s = prefix.shape[1]
    images = s - data.tokens.shape[1]
    target = np.concatenate([np.zeros((b, images), bool), data.token_causal], 1)
    valid = np.concatenate([prefix_mask, np.ones((b, 1), bool), data.action_mask.any(-1)], 1)
    block = np.concatenate([np.cumsum(target, 1), np.full((b, 1), 100), np.full((b, k), 101)], 1)
    allowed = (block[:, None] <= block[:, :, None]) & valid[:, None] & valid[:, :, None]
    allowed[:, s:, :s] &= ~target[:, None]  # the expert sees no text target
    prefix_pos = np.maximum(np.cumsum(prefix_mask, 1) - 1, 0)
    seen = (np.asarray(prefix_mask) & ~target).sum(1, keepdims=True)
    positions = np.concatenate([prefix_pos, seen + np.arange(k + 1)], 1)

    def rope(x):
        half = x.shape[-1] // 2
        angle = positions[..., None] / 10_000 ** (np.arange(half) / half)
        sin, cos = np.sin(angle)[:, :, None], np.cos(angle)[:, :, None]
        a, c = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - c * sin, c * cos + a * sin], -1)

    def norm(x, weights, cond):
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        if "scale" in weights:
            return x * (1 + weights["scale"]), 1.0
        scale, shift, gate = jnp.split(
            cond @ weights["Dense_0"]["kernel"] + weights["Dense_0"]["bias"], 3, -1
        )
        return x * (1 + scale) + shift, gate

    towers = [(params["backbone"]["llm"], None), (p, condition)]
    xs = [prefix, suffix]
    for layer in range(cfg.backbone.text.depth):
        w = [jax.tree.map(lambda a: a[layer], tower["layers"]) for tower, _ in towers]
        normed = [norm(x, w[i]["pre_attention_norm"], towers[i][1]) for i, x in enumerate(xs)]
        q = jnp.concatenate(
            [
                jnp.einsum("btd,nde->btne", x, w[i]["attn"]["q_einsum"]["w"])
                for i, (x, _) in enumerate(normed)
            ],
            1,
        )
        kv = jnp.concatenate(
            [
                jnp.einsum("btd,cmde->cbtme", x, w[i]["attn"]["kv_einsum"]["w"])
                for i, (x, _) in enumerate(normed)
            ],
            2,
        )
        repeats = cfg.backbone.text.heads // cfg.backbone.text.kv_heads
        keys, values = (jnp.repeat(z, repeats, axis=2) for z in (rope(kv[0]), kv[1]))
        logits = jnp.einsum("btne,bsne->bnts", rope(q), keys) / np.sqrt(cfg.backbone.text.head_dim)
        weights = jax.nn.softmax(jnp.where(allowed[:, None], logits, -1e30), -1)
        out = jnp.einsum("bnts,bsne->btne", weights, values)
        for i, part in enumerate([out[:, :s], out[:, s:]]):
            x = xs[i] + normed[i][1] * jnp.einsum("btne,ned->btd", part, w[i]["attn"]["attn_vec_einsum"]["w"])
            h, gate = norm(x, w[i]["pre_ffw_norm"], towers[i][1])
            g = w[i]["mlp"]["gating_einsum"]
            xs[i] = x + gate * (
                (jax.nn.gelu(h @ g[0], approximate=True) * (h @ g[1])) @ w[i]["mlp"]["linear"]
            )
    text, _ = norm(xs[0][:, images:], towers[0][0]["final_norm"], None)
    actions, _ = norm(xs[1], p["final_norm"], condition)
    velocity = actions[:, -k:] @ p["action_out_proj"]["kernel"] + p["action_out_proj"]["bias"]
    return velocity, text @ params["backbone"]["llm"]["embedder"]["input_embedding"].T
