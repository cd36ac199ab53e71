"""openpi's published inference, written from its description, as the other side of benchmarks/openpi_policy.py.

What is kept as published (openpi's models/pi0.py, models/gemma.py, policies/policy.py):

- always three camera slots; one without a picture is black and masked, and is encoded all the same;
- each camera through SigLIP by itself; prompts padded to the longest length and masked;
- layers stacked and scanned; q and k/v as einsums of their own; rotary angles in each layer; softmax of float32 logits
  over a mask filled with -2.38e38; the cache of all prefix layers, its last one computed whole;
- a `while_loop` over a float time that goes from 1 (noise) to 0 by -1/n while it is above half a step; the time
  embedding and its MLP in every step; in each layer the cache concatenated with the new keys and values;
- the call around it: arrays to the device one by one, uint8 images to [-1, 1], the key split, the state normalised and
  actions brought back with numpy.

Our parameters are used as they are. Our velocity points from noise to data, so the result's sign is turned, and the
time MLP is given the time by the clock of the parameters (`expert.clock`; that of the presets pi0 and pi05
is openpi's). Both cost nothing and make the actions comparable.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vla_jax.data.sample import Sample
from vla_jax.models.config import VLAConfig
from vla_jax.serve.compiled.preprocess import tokenize_of
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation, PyTree

SLOTS = 3
MASKED = -2.3819763e38


class Observed(NamedTuple):
    """What the jitted function takes."""

    images: tuple[Float[Array, "b h w 3"], ...]
    image_masks: tuple[Bool[Array, " b"], ...]
    state: Float[Array, "b q"]
    tokens: Int[Array, "b l"]
    token_mask: Bool[Array, "b l"]


class Reference:
    """A policy as openpi runs one: `infer` from numpy to numpy."""

    def __init__(self, policy: Policy, *, num_steps: int, dtype: str):
        model = policy.config.model
        if len(model.cameras) != SLOTS:
            raise ValueError(f"openpi's policies have {SLOTS} cameras, this one {len(model.cameras)}")
        self._dims, most = len(policy.bundle.schema.action_names), model.expert.action_dim
        if self._dims < most and model.expert.padding == "zero":
            raise ValueError(
                f"openpi puts noise into all {most} action dims, but this policy knows it in {self._dims} of them only "
                "(model.expert.padding=zero)"
            )
        self.policy = policy
        self.params = jax.tree.map(lambda p: jnp.asarray(p, dtype), policy.params)
        self._tokenize = tokenize_of(policy.bundle)
        self._sample = jax.jit(functools.partial(sample_actions, model, num_steps, dtype))
        (self._offset, _, self._inverse), (self._shift, self._scale, _) = (
            policy.bundle.normalize.affine("", field) for field in ("state", "action")
        )

    def infer(self, observation: Observation, key: Array) -> np.ndarray:
        """Actions [b k a] in the robot's units."""
        robots = len(observation.instruction)
        size = self.policy.config.model.backbone.vision.image_size
        state = ((observation.state - self._offset) * self._inverse).astype(np.float32)
        padding = self.policy.config.model.expert.state_dim - state.shape[-1]
        seen = [
            Sample(images={}, state=row, instruction=text)
            for row, text in zip(state, observation.instruction)
        ]
        rows = [self._tokenize.inputs(sample).text for sample in seen]
        _, for_noise = jax.random.split(key)
        images, masks = [], []
        for name in self.policy.config.model.cameras:
            there = observation.images.get(name) is not None
            image = observation.images[name] if there else np.zeros((robots, size, size, 3), np.uint8)
            images.append(jnp.asarray(image).astype(jnp.float32) / 255.0 * 2.0 - 1.0)
            masks.append(jnp.full((robots,), there))
        observed = Observed(
            tuple(images),
            tuple(masks),
            jnp.asarray(np.pad(state, ((0, 0), (0, padding)))),
            jnp.asarray(np.stack([row.tokens for row in rows])),
            jnp.asarray(np.stack([row.mask for row in rows])),
        )
        actions = np.asarray(self._sample(self.params, observed, for_noise))
        return (actions[..., : self._dims] * self._scale + self._shift).astype(np.float32)


def sample_actions(
    cfg: VLAConfig, num_steps: int, dtype: str, params: PyTree, seen: Observed, key: Array
) -> Float[Array, "b k a"]:
    """Prefix once, then the loop."""
    b = seen.state.shape[0]
    expert = cfg.expert
    tokens, mask = _embed_prefix(cfg, params, seen, dtype)
    positions = jnp.cumsum(mask, axis=1) - 1
    allowed = _attention_mask(mask, jnp.zeros(mask.shape[1], bool))
    _, cache = _tower(cfg, params["backbone"]["llm"], tokens, positions, allowed, None, None)
    # A key for each robot, as our policies have it, so that the actions can be compared.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    noise = jax.vmap(lambda key: jax.random.normal(key, (expert.horizon, expert.action_dim)))(keys)
    dt = -1.0 / num_steps

    def step(carry):
        x, time = carry
        suffix, starts, condition = _embed_suffix(cfg, params["expert"], seen.state, x, time, dtype)
        suffix_mask = jnp.ones(suffix.shape[:2], bool)
        own = _attention_mask(suffix_mask, starts)
        prefix_mask = jnp.broadcast_to(mask[:, None], (b, suffix.shape[1], mask.shape[1]))
        full = jnp.concatenate([prefix_mask, own], axis=-1)
        at = jnp.sum(mask, axis=-1)[:, None] + jnp.cumsum(suffix_mask, axis=-1) - 1
        out, _ = _tower(cfg, params["expert"], suffix, at, full, cache, condition)
        velocity = -_linear(params["expert"]["action_out_proj"], out[:, -expert.horizon :])
        return x + dt * velocity, time + dt

    x, _ = jax.lax.while_loop(lambda carry: carry[1] >= -dt / 2, step, (noise, jnp.float32(1.0)))
    return x


def _embed_prefix(
    cfg: VLAConfig, params: PyTree, seen: Observed, dtype: str
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
    tokens, masks = [], []
    for image, mask in zip(seen.images, seen.image_masks):
        encoded = _siglip(cfg, params["backbone"]["img"], image, dtype)
        tokens.append(encoded)
        masks.append(jnp.repeat(mask[:, None], encoded.shape[1], axis=1))
    table = params["backbone"]["llm"]["embedder"]["input_embedding"]
    text = table[seen.tokens].astype(dtype) * jnp.asarray(cfg.backbone.text.width**0.5, dtype)
    return jnp.concatenate([*tokens, text], axis=1), jnp.concatenate([*masks, seen.token_mask], axis=1)


def _embed_suffix(
    cfg: VLAConfig, w: PyTree, state: Array, x: Array, time: Array, dtype: str
) -> tuple[Float[Array, "b t d"], Bool[Array, " t"], Float[Array, "b d"] | None]:
    b, width = x.shape[0], cfg.expert.width
    clock = time if cfg.expert.clock == "reversed" else 1 - time
    embedded = _posemb(jnp.broadcast_to(clock, (b,)), width).astype(dtype)
    actions = _linear(w["action_in_proj"], x.astype(dtype))
    starts = jnp.arange(cfg.expert.horizon) == 0
    if cfg.expert.time == "adarms":
        hidden = jax.nn.swish(_linear(w["time_mlp_in"], embedded))
        return actions, starts, jax.nn.swish(_linear(w["time_mlp_out"], hidden))
    time_tokens = jnp.repeat(embedded[:, None], cfg.expert.horizon, axis=1)
    mixed = jnp.concatenate([actions, time_tokens], axis=-1)
    actions = _linear(w["action_time_mlp_out"], jax.nn.swish(_linear(w["action_time_mlp_in"], mixed)))
    token = _linear(w["state_proj"], state.astype(dtype))[:, None]
    return jnp.concatenate([token, actions], axis=1), jnp.concatenate([jnp.ones(1, bool), starts]), None


def _posemb(t: Float[Array, " b"], width: int) -> Float[Array, "b d"]:
    period = 4e-3 * (4.0 / 4e-3) ** jnp.linspace(0.0, 1.0, width // 2)
    angle = jnp.einsum("i,j->ij", t, 2 * jnp.pi / period, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _attention_mask(valid: Bool[Array, "b t"], starts: Bool[Array, " t"]) -> Bool[Array, "b t t"]:
    count = jnp.cumsum(jnp.broadcast_to(starts, valid.shape), axis=1)
    blocks = count[:, None, :] <= count[:, :, None]
    return blocks & (valid[:, None, :] & valid[:, :, None])


def _tower(cfg: VLAConfig, w: PyTree, x: Array, positions: Array, mask: Array, cache: Any, condition: Any):
    """Scanned layers; with a cache its keys and values are concatenated in front in each of them."""
    n, m, e = cfg.backbone.text.heads, cfg.backbone.text.kv_heads, cfg.backbone.text.head_dim

    def layer(x, inputs):
        p, past = inputs
        h, gate = _norm(p["pre_attention_norm"], x, condition)
        q = jnp.einsum("btd,ndh->btnh", h, p["attn"]["q_einsum"]["w"])
        k, v = jnp.einsum("bsd,ckdh->cbskh", h, p["attn"]["kv_einsum"]["w"])
        q, k = _rope(q, positions) * e**-0.5, _rope(k, positions)
        if past is not None:
            k = jnp.concatenate([past[0], k], axis=1)
            v = jnp.concatenate([past[1], v], axis=1)
        q = q.reshape(*q.shape[:2], m, n // m, e)
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None], logits, MASKED)
        probs = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(*x.shape[:2], n, e)
        out = jnp.einsum("btnh,nhd->btd", out, p["attn"]["attn_vec_einsum"]["w"])
        x = x + (out if gate is None else out * gate)
        h, gate = _norm(p["pre_ffw_norm"], x, condition)
        gating = p["mlp"]["gating_einsum"]
        out = (jax.nn.gelu(h @ gating[0]) * (h @ gating[1])) @ p["mlp"]["linear"]
        x = x + (out if gate is None else out * gate)
        return x, (k, v)

    x, cache = jax.lax.scan(layer, x, (w["layers"], cache))
    return _norm(w["final_norm"], x, condition)[0], cache


def _norm(p: PyTree, x: Array, condition: Array | None) -> tuple[Array, Array | None]:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if condition is None or "scale" in p:
        return (normed * (1 + p["scale"])).astype(x.dtype), None
    modulation = _linear(p["Dense_0"], condition)
    scale, shift, gate = jnp.split(modulation[:, None], 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


def _rope(x: Array, positions: Array) -> Array:
    half = x.shape[-1] // 2
    timescale = 10_000 ** (2.0 / x.shape[-1] * jnp.arange(half, dtype=jnp.float32))
    radians = (positions[..., None] / timescale)[..., None, :]
    sin, cos = jnp.sin(radians), jnp.cos(radians)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _siglip(cfg: VLAConfig, w: PyTree, image: Array, dtype: str) -> Float[Array, "b p d"]:
    """One camera; position table and patches in float32, blocks in `dtype`, scanned."""
    vision = cfg.backbone.vision
    x = jax.lax.conv_general_dilated(
        image, w["embedding"]["kernel"].astype(jnp.float32), (vision.patch,) * 2, "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = (x + w["embedding"]["bias"]).reshape(x.shape[0], -1, vision.width) + w["pos_embedding"]
    heads = vision.width // vision.heads

    def layer(x, p):
        attn, mlp = p["MultiHeadDotProductAttention_0"], p["MlpBlock_0"]
        h = _layer_norm(p["LayerNorm_0"], x)
        q, k, v = (
            jnp.einsum("bpd,dne->bpne", h, attn[name]["kernel"]) + attn[name]["bias"]
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqne,bkne->bnqk", q * heads**-0.5, k), axis=-1)
        out = jnp.einsum("bnqk,bkne->bqne", weights, v)
        x = x + jnp.einsum("bqne,ned->bqd", out, attn["out"]["kernel"]) + attn["out"]["bias"]
        h = jax.nn.gelu(_linear(mlp["Dense_0"], _layer_norm(p["LayerNorm_1"], x)))
        return x + _linear(mlp["Dense_1"], h), None

    x, _ = jax.lax.scan(layer, x.astype(dtype), w["Transformer"]["encoderblock"])
    return _linear(w["head"], _layer_norm(w["Transformer"]["encoder_norm"], x))


def _layer_norm(p: PyTree, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]).astype(x.dtype)


def _linear(p: PyTree, x: Array) -> Array:
    return x @ p["kernel"] + p["bias"]
