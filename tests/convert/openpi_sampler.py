"""openpi's π0 and π0.5 and their sampler, written once more in numpy on the arrays of its files.

Nothing of ours is used: neither names and layouts of parameters, nor caches, masks, clocks or solvers. Time 1 is noise
and 0 data, as in openpi. All is float64 but the angles of the time embedding: they reach 1570 rad, where float32 keeps
four decimals, and that rounding is part of the network.
"""

import re

import numpy as np

from tests.convert import layouts


def arrays(sizes: layouts.Sizes, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of variance 1/fan-in, so that the chunk depends on all that the network reads.

    Velocities are a fifth of the noise: larger ones make float32's rounding grow beyond 1e-5 in ten steps.
    """
    fan_in = {
        r"q_einsum|kv_einsum|gating_einsum|linear|Dense_|_proj|time_mlp|head/": lambda s: s[-2],
        r"attn_vec_einsum|/out/": lambda s: s[-3] * s[-2],
        r"(query|key|value)/": lambda s: s[1],
        r"embedding/kernel": lambda s: np.prod(s[:3]),
        r"input_embedding": lambda s: s[1],
    }
    rng, out = np.random.default_rng(seed), {}
    for name, shape in sorted(layouts.openpi(sizes, kind).items()):
        size = 100.0  # of biases and scales
        if not name.endswith(("bias", "scale")):
            size = next((f(shape) for pattern, f in fan_in.items() if re.search(pattern, name)), 1.0)
        gain = 0.2 if name.startswith("action_out_proj") else 1.0
        out[name] = (gain * rng.normal(size=shape) / np.sqrt(size)).astype(np.float32)
    return out


def sample(
    weights,
    sizes,
    kind,
    *,
    images,
    tokens,
    token_mask,
    state,
    noise,
    num_steps=10,
    correct=lambda x, time, v: v,
):
    """Chunks [b k a] in the model's units and dims: Euler from `noise` [b k a], in all of them.

    images [c] of [b h w 3] in [-1, 1], tokens and their mask [b l], state [b q] normalised and padded. `correct` makes
    another velocity of the network's.
    """
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    prefix = [_siglip(w, sizes, image) for image in images]
    text = w["PaliGemma/llm/embedder/input_embedding"][tokens] * sizes.width**0.5
    valid = np.concatenate([*(np.ones(x.shape[:2], bool) for x in prefix), token_mask], 1)
    prefix = np.concatenate([*prefix, text], 1)
    x, dt = noise.astype(np.float64), -1 / num_steps
    for step in range(num_steps):
        time = 1 + step * dt
        x = x + dt * correct(x, time, _velocity(w, sizes, kind, prefix, valid, state, x, time))
    return x


def _velocity(w, sizes, kind, prefix, valid, state, x, time):
    """Noise less data. Blocks: [prefix][state][actions]; each sees itself and those before."""
    b, k, _ = x.shape
    actions, time = (
        _linear(w, "action_in_proj", x),
        np.broadcast_to(_posemb(time, sizes.expert), (b, sizes.expert)),
    )
    condition, first = None, []
    if kind == "pi05":
        condition = _swish(_linear(w, "time_mlp_out", _swish(_linear(w, "time_mlp_in", time))))
    else:
        mixed = np.concatenate([actions, np.broadcast_to(time[:, None], (b, k, sizes.expert))], -1)
        actions = _linear(w, "action_time_mlp_out", _swish(_linear(w, "action_time_mlp_in", mixed)))
        first = [_linear(w, "state_proj", state)[:, None]]
    suffix = np.concatenate([*first, actions], 1)
    p, s = prefix.shape[1], suffix.shape[1]
    valid = np.concatenate([valid, np.ones((b, s), bool)], 1)
    block = np.concatenate([np.zeros(p), np.arange(1, len(first) + 1), np.full(k, 2)])
    allowed = valid[:, None, :] & (block[None, :] <= block[:, None])
    positions = np.cumsum(valid, 1) - 1
    xs = [prefix, suffix]
    for layer in range(sizes.depth):
        xs = _block(w, sizes, xs, layer, allowed, positions, condition)
    out, _ = _norm(w, "PaliGemma/llm/final_norm_1", (), xs[1], condition)
    return _linear(w, "action_out_proj", out[:, -k:])


def _block(w, sizes, xs, layer, allowed, positions, condition):
    """One attention over the tokens of both towers, each with its own weights."""
    base, towers = "PaliGemma/llm/layers", ("", "_1")
    normed = [
        _norm(w, f"{base}/pre_attention_norm{t}", layer, x, condition if t else None)
        for t, x in zip(towers, xs)
    ]
    q = np.concatenate(
        [
            np.einsum("btd,nde->btne", h, w[f"{base}/attn/q_einsum{t}/w"][layer])
            for t, (h, _) in zip(towers, normed)
        ],
        1,
    )
    kv = np.concatenate(
        [
            np.einsum("btd,cmde->cbtme", h, w[f"{base}/attn/kv_einsum{t}/w"][layer])
            for t, (h, _) in zip(towers, normed)
        ],
        2,
    )
    keys, values = (np.repeat(z, sizes.heads // sizes.kv, axis=2) for z in (_rope(kv[0], positions), kv[1]))
    logits = np.einsum("btne,bsne->bnts", _rope(q, positions), keys) * sizes.head_dim**-0.5
    mixed = np.einsum("bnts,bsne->btne", _softmax(np.where(allowed[:, None], logits, -2.38e38)), values)
    out = []
    for t, x, (_, gate), part in zip(towers, xs, normed, np.split(mixed, [xs[0].shape[1]], axis=1)):
        x = x + gate * np.einsum("btne,ned->btd", part, w[f"{base}/attn/attn_vec_einsum{t}/w"][layer])
        h, gate = _norm(w, f"{base}/pre_ffw_norm{t}", layer, x, condition if t else None)
        into = w[f"{base}/mlp{t}/gating_einsum"][layer]
        out.append(x + gate * ((_gelu(h @ into[0]) * (h @ into[1])) @ w[f"{base}/mlp{t}/linear"][layer]))
    return out


def _norm(w, name, layer, x, condition):
    """RMSNorm, or the adaptive one with its gate."""
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    if f"{name}/scale" in w:
        return x * (1 + w[f"{name}/scale"][layer]), 1.0
    modulation = condition @ w[f"{name}/Dense_0/kernel"][layer] + w[f"{name}/Dense_0/bias"][layer]
    scale, shift, gate = np.split(modulation[:, None], 3, -1)
    return x * (1 + scale) + shift, gate


def _siglip(w, sizes, image):
    base = "PaliGemma/img"
    side = image.shape[1] // sizes.patch
    patches = image.reshape(-1, side, sizes.patch, side, sizes.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(*patches.shape[:1], side * side, -1) @ w[f"{base}/embedding/kernel"].reshape(
        -1, sizes.vision
    )
    x = x + w[f"{base}/embedding/bias"] + w[f"{base}/pos_embedding"]
    block = f"{base}/Transformer/encoderblock"
    for i in range(sizes.vision_depth):
        attn = f"{block}/MultiHeadDotProductAttention_0"
        h = _layer_norm(w, f"{block}/LayerNorm_0", i, x)
        q, k, v = (
            np.einsum("bpd,dne->bpne", h, w[f"{attn}/{n}/kernel"][i]) + w[f"{attn}/{n}/bias"][i]
            for n in ("query", "key", "value")
        )
        mixed = _softmax(np.einsum("bqne,bkne->bnqk", q, k) * q.shape[-1] ** -0.5)
        mixed = np.einsum("bnqk,bkne->bqne", mixed, v)
        x = x + np.einsum("bqne,ned->bqd", mixed, w[f"{attn}/out/kernel"][i]) + w[f"{attn}/out/bias"][i]
        h = _layer_norm(w, f"{block}/LayerNorm_1", i, x)
        h = _gelu(h @ w[f"{block}/MlpBlock_0/Dense_0/kernel"][i] + w[f"{block}/MlpBlock_0/Dense_0/bias"][i])
        x = x + h @ w[f"{block}/MlpBlock_0/Dense_1/kernel"][i] + w[f"{block}/MlpBlock_0/Dense_1/bias"][i]
    return _linear(w, f"{base}/head", _layer_norm(w, f"{base}/Transformer/encoder_norm", (), x))


def _layer_norm(w, name, layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * w[f"{name}/scale"][layer] + w[f"{name}/bias"][layer]


def _rope(x, positions):
    half = x.shape[-1] // 2
    angle = (positions[..., None] / 10_000 ** (np.arange(half) / half))[:, :, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def _posemb(time, width):
    period = np.float32(4e-3) * np.float32(1000) ** np.linspace(0, 1, width // 2, dtype=np.float32)
    angle = (np.float32(2 * np.pi) * np.float32(time) / period).astype(np.float64)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def _linear(w, name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _swish(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
