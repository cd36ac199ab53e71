"""From a checkpoint's parameters to the weights of the compiled network, rewritten once at load.

All arithmetic is float32; only the result takes the type that the network computes in. Layout: every projection is
[inputs, outputs…], so that applying it is one matrix product without a transpose. What a rewrite has folded away is
None. LoRA's factors stay beside the matrices that are rounded (`weight.py`); those that stay float32 are merged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.lora import merge
from vla_jax.models.config import VLAConfig
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.compiled.quantize import Kept, quantize
from vla_jax.serve.compiled.weight import (
    Weight,
    concatenate,
    heads_first,
    join_inputs,
    join_outputs,
    one_of,
    outputs_from,
    side_by_side,
)
from vla_jax.types import PyTree

Finish = Callable[..., Kept]
"""A float32 `Weight` in the form in which it is kept; `stacked`: it has a layers axis, which is no part of it."""

NORMS = ("pre_attention_norm", "pre_ffw_norm")


def rewrite(
    params: PyTree,
    model: VLAConfig,
    config: CompileConfig,
    *,
    state_dims: int,
    action_dims: int,
    split_qkv: bool = False,
) -> PyTree:
    """Weights of vision, text and expert.

    `state_dims` and `action_dims` are the robot's. Padded state is zeros: its rows are left out. Rows of padded action
    dims are zeros where those dims are (`expert.padding`). `split_qkv`: q, k, v apart even with `fuse` (heads on
    several devices).
    """
    rewrites = config.rewrites
    dtype = jnp.dtype(config.dtype or model.dtype)
    int8 = config.weights == "int8"

    def keep(w: Array) -> Kept:
        return quantize(w) if int8 else w.astype(dtype)

    def finish(weight: Weight, *, stacked: bool = True) -> Kept:
        if dtype == jnp.float32 and not int8:  # the sum loses nothing
            weight = Weight(weight.merged())
        return weight.finish(keep, dtype, stacked=stacked)

    img, llm, expert = params["backbone"]["img"], params["backbone"]["llm"], params["expert"]
    text = _decoder_layers(llm["layers"], model, rewrites, finish, split_qkv=split_qkv)
    weights = {
        "vision": _vision(img, model, rewrites, finish, dtype, split_qkv),
        "text": {
            "layers": _arrange(text, rewrites, skip_last=rewrites.last_layer),
        },
        "expert": _expert(expert, model, rewrites, finish, state_dims, action_dims, split_qkv),
    }
    if not rewrites.embeddings:
        weights["text"]["embedding"] = llm["embedder"]["input_embedding"]
    if rewrites.last_layer:
        weights["text"]["last"] = _only_keys(jax.tree.map(lambda leaf: leaf[-1], text), model)
    return weights


def _arrange(layers: PyTree, rewrites: Rewrites, *, skip_last: bool = False) -> PyTree:
    """Stacked layers as a list of layers (`unstack`), the last one left out where it is treated by itself."""
    depth = jax.tree.leaves(layers)[0].shape[0] - skip_last
    if rewrites.unstack:
        return [jax.tree.map(lambda leaf: leaf[i], layers) for i in range(depth)]
    return jax.tree.map(lambda leaf: leaf[:depth], layers) if skip_last else layers


def _only_keys(layer: PyTree, model: VLAConfig) -> PyTree:
    """What a decoder layer needs for its keys and values alone."""
    heads = model.backbone.text.heads
    qkv = layer["qkv"]
    kept = (outputs_from(qkv[0], heads),) if len(qkv) == 1 else qkv[1:]
    return {"attn_norm": layer["attn_norm"], "qkv": kept}


def _decoder_layers(layers: PyTree, model: VLAConfig, rewrites: Rewrites, finish: Finish, *, split_qkv: bool):
    """Stacked decoder layers in our layout, norms and scales folded."""
    attn, mlp, text = layers["attn"], layers["mlp"], model.backbone.text
    q = heads_first(Weight.of(attn["q_einsum"], "w"))  # layers d n e
    kv = join_outputs(side_by_side(Weight.of(attn["kv_einsum"], "w"), 3))  # layers d 2m e
    up = side_by_side(Weight.of(mlp, "gating_einsum"), 2)  # layers d 2 f
    scales = {name: layers[name].get("scale") for name in NORMS}
    if rewrites.norms:
        if scales["pre_attention_norm"] is not None:
            by = 1 + _f32(scales["pre_attention_norm"])
            q, kv = q.scale_inputs(by), kv.scale_inputs(by)
        if scales["pre_ffw_norm"] is not None:
            up = up.scale_inputs(1 + _f32(scales["pre_ffw_norm"]))
        scales = dict.fromkeys(scales)
    q_scale = text.head_dim**-0.5
    if rewrites.projections:
        q, q_scale = q.scale_outputs(q_scale), None
    fused = rewrites.fuse and not split_qkv
    qkv = (concatenate([q, kv]),) if fused else (q, kv)
    ups = (up,) if rewrites.fuse else (one_of(up, 0), one_of(up, 1))
    return {
        "attn_norm": scales["pre_attention_norm"],
        "qkv": tuple(finish(w) for w in qkv),
        "q_scale": None if q_scale is None else jnp.full(q.w.shape[0], q_scale, jnp.float32),
        "out": finish(join_inputs(Weight.of(attn["attn_vec_einsum"], "w"))),
        "ffw_norm": scales["pre_ffw_norm"],
        "up": tuple(finish(w) for w in ups),
        "down": finish(Weight.of(mlp, "linear")),
    }


def _vision(
    img: PyTree, model: VLAConfig, rewrites: Rewrites, finish: Finish, dtype: jnp.dtype, split_qkv: bool
) -> PyTree:
    """The image encoder; `patch_bias` holds the position table too."""
    cfg, layers = model.backbone.vision, img["Transformer"]["encoderblock"]
    attn, mlp = layers["MultiHeadDotProductAttention_0"], layers["MlpBlock_0"]
    patches = merge(img["embedding"], 1.0, "backbone/img/embedding/")
    kernel, bias = _f32(patches["kernel"]), _f32(patches["bias"])
    if rewrites.norms:  # pixels arrive as 0 … 255
        bias, kernel = bias - kernel.sum((0, 1, 2)), kernel / 127.5
    qkv = [Weight.of(attn[name], "kernel") for name in ("query", "key", "value")]  # layers d n e
    qkv_bias = [_f32(attn[name]["bias"]) for name in ("query", "key", "value")]
    up, up_bias = Weight.of(mlp["Dense_0"], "kernel"), _f32(mlp["Dense_0"]["bias"])
    norms: list = [layers["LayerNorm_0"], layers["LayerNorm_1"]]
    head, head_bias = Weight.of(img["head"], "kernel"), _f32(img["head"]["bias"])
    last_norm = img["Transformer"]["encoder_norm"]
    if rewrites.norms:
        (scale, shift), (scale1, shift1) = ((_f32(n["scale"]), _f32(n["bias"])) for n in norms)
        qkv_bias = [b + jnp.einsum("ld,ldne->lne", shift, w.merged()) for w, b in zip(qkv, qkv_bias)]
        qkv = [w.scale_inputs(scale) for w in qkv]
        up_bias, up = up_bias + jnp.einsum("ld,ldf->lf", shift1, up.merged()), up.scale_inputs(scale1)
        head_bias = head_bias + _f32(last_norm["bias"]) @ head.merged()
        head = head.scale_inputs(_f32(last_norm["scale"]))
        norms, last_norm = [None, None], None
    q_scale = (cfg.width // cfg.heads) ** -0.5
    if rewrites.projections:
        qkv[0], qkv_bias[0], q_scale = qkv[0].scale_outputs(q_scale), qkv_bias[0] * q_scale, None
    if rewrites.fuse and not split_qkv:
        qkv, qkv_bias = [concatenate(qkv)], [jnp.concatenate(qkv_bias, axis=1)]
    out = join_inputs(Weight.of(attn["out"], "kernel"))
    blocks = {
        "norm0": norms[0],
        "qkv": tuple(finish(w) for w in qkv),
        "qkv_bias": tuple(b.astype(dtype) for b in qkv_bias),
        "q_scale": None if q_scale is None else jnp.full(out.w.shape[0], q_scale, jnp.float32),
        "out": finish(out),
        "out_bias": attn["out"]["bias"].astype(dtype),
        "norm1": norms[1],
        "up": finish(up),
        "up_bias": up_bias.astype(dtype),
        "down": finish(Weight.of(mlp["Dense_1"], "kernel")),
        "down_bias": mlp["Dense_1"]["bias"].astype(dtype),
    }
    return {
        "patch": kernel.reshape(-1, kernel.shape[-1]) if rewrites.patches else kernel,
        "patch_bias": bias + _f32(img["pos_embedding"][0]),
        "layers": blocks,  # stacked: one after another in the program they take twice as long (XLA 0.10, CPU)
        "norm": last_norm,
        "head": finish(head, stacked=False),
        "head_bias": head_bias.astype(dtype),
    }


def _expert(
    expert: PyTree,
    model: VLAConfig,
    rewrites: Rewrites,
    finish: Finish,
    state_dims: int,
    action_dims: int,
    split_qkv: bool,
) -> PyTree:
    """The action expert. Its small projections stay float32: they touch a few dozen tokens only."""
    width, layers = model.expert.width, expert["layers"]
    norms = {name: merge(layers[name], 1.0, f"expert/layers/{name}/") for name in NORMS}
    expert = merge({name: part for name, part in expert.items() if name != "layers"}, 1.0, "expert/")
    into = {name: _f32(leaf) for name, leaf in expert["action_in_proj"].items()}
    if model.expert.padding == "zero":
        into["kernel"] = into["kernel"].at[action_dims:].set(0)
    out = {name: _f32(leaf) for name, leaf in expert["action_out_proj"].items()}
    final = expert["final_norm"].get("scale")
    if rewrites.norms and final is not None:
        out["kernel"], final = out["kernel"] * (1 + _f32(final))[:, None], None
    weights = {
        "layers": _arrange(_decoder_layers(layers, model, rewrites, finish, split_qkv=split_qkv), rewrites),
        "action_out": out,
        "final_norm": final,
    }
    if model.expert.state_token:
        weights["state"] = {
            "kernel": _f32(expert["state_proj"]["kernel"])[:state_dims],
            "bias": _f32(expert["state_proj"]["bias"]),
        }
    if model.expert.time == "adarms":
        weights["action_in"] = into
        weights["time"] = {name: jax.tree.map(_f32, expert[name]) for name in ("time_mlp_in", "time_mlp_out")}
        weights["modulation"] = {
            "layers": {name: jax.tree.map(_f32, norms[name]["Dense_0"]) for name in NORMS},
            "final": jax.tree.map(_f32, expert["final_norm"]["Dense_0"]),
        }
        return weights
    mix = {name: _f32(leaf) for name, leaf in expert["action_time_mlp_in"].items()}
    actions, time = mix["kernel"][:width], mix["kernel"][width:]
    weights["time"] = {"kernel": time, "bias": mix["bias"]}
    weights["mix_out"] = jax.tree.map(_f32, expert["action_time_mlp_out"])
    if rewrites.projections:
        weights["time"]["bias"] = mix["bias"] + into["bias"] @ actions
        weights["action_in"] = {"kernel": into["kernel"] @ actions}
    else:
        weights["action_in"] = into
        weights["mix_actions"] = actions
    return weights


def _f32(x: Array) -> Float[Array, "..."]:
    return jnp.asarray(x, jnp.float32)
