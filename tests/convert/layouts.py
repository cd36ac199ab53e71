"""The public files' arrays, name by name and shape by shape, at any size, and random files of them.

Written from descriptions of the files (docs/weights.md), not from the converters' tables.
"""

import dataclasses

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    patch: int
    patches: int
    vision: int
    vision_depth: int
    vision_mlp: int
    vision_heads: int
    width: int
    depth: int
    mlp: int
    heads: int
    kv: int
    head_dim: int
    vocab: int
    expert: int
    expert_mlp: int
    actions: int
    states: int


FULL = Sizes(14, 256, 1152, 27, 4304, 16, 2048, 18, 16384, 8, 1, 256, 257152, 1024, 4096, 32, 32)
TINY = Sizes(4, 4, 32, 2, 24, 16, 48, 3, 40, 8, 1, 8, 63, 24, 20, 5, 6)
COUNTS = {"paligemma": 2_923_335_408, "pi0": 3_238_048_528, "pi05": 3_353_433_872}


def big_vision(s: Sizes) -> Shapes:
    """The keys of PaliGemma's npz, without ``params/``."""
    head = s.vision // s.vision_heads
    block = "img/Transformer/encoderblock"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    n, d = s.vision_depth, s.vision
    out: Shapes = {
        "img/embedding/kernel": (s.patch, s.patch, 3, d),
        "img/embedding/bias": (d,),
        "img/pos_embedding": (1, s.patches, d),
        f"{attention}/out/kernel": (n, s.vision_heads, head, d),
        f"{attention}/out/bias": (n, d),
        f"{block}/MlpBlock_0/Dense_0/kernel": (n, d, s.vision_mlp),
        f"{block}/MlpBlock_0/Dense_0/bias": (n, s.vision_mlp),
        f"{block}/MlpBlock_0/Dense_1/kernel": (n, s.vision_mlp, d),
        f"{block}/MlpBlock_0/Dense_1/bias": (n, d),
        "img/head/kernel": (d, s.width),
        "img/head/bias": (s.width,),
        "llm/embedder/input_embedding": (s.vocab, s.width),
    }
    for name in ("query", "key", "value"):
        out[f"{attention}/{name}/kernel"] = (n, d, s.vision_heads, head)
        out[f"{attention}/{name}/bias"] = (n, s.vision_heads, head)
    for name in ("LayerNorm_0", "LayerNorm_1"):
        out |= {f"{block}/{name}/{part}": (n, d) for part in ("scale", "bias")}
    out |= {f"img/Transformer/encoder_norm/{part}": (d,) for part in ("scale", "bias")}
    return out | tower(s, s.width, s.mlp, "", adaptive=False)


def tower(s: Sizes, width: int, mlp: int, suffix: str, *, adaptive: bool) -> Shapes:
    """The blocks of Gemma, of the decoder (no suffix) or of openpi's expert (``_1``)."""
    n, layers = s.depth, "llm/layers"
    out = {
        f"{layers}/attn/q_einsum{suffix}/w": (n, s.heads, width, s.head_dim),
        f"{layers}/attn/kv_einsum{suffix}/w": (n, 2, s.kv, width, s.head_dim),
        f"{layers}/attn/attn_vec_einsum{suffix}/w": (n, s.heads, s.head_dim, width),
        f"{layers}/mlp{suffix}/gating_einsum": (n, 2, width, mlp),
        f"{layers}/mlp{suffix}/linear": (n, mlp, width),
    }
    norms = {
        f"{layers}/pre_attention_norm{suffix}": (n,),
        f"{layers}/pre_ffw_norm{suffix}": (n,),
        f"llm/final_norm{suffix}": (),
    }
    for name, lead in norms.items():
        if adaptive:
            out[f"{name}/Dense_0/kernel"] = (*lead, width, 3 * width)
            out[f"{name}/Dense_0/bias"] = (*lead, 3 * width)
        else:
            out[f"{name}/scale"] = (*lead, width)
    return out


def openpi(s: Sizes, kind: str) -> Shapes:
    """``PaliGemma/…`` and the heads, for pi0, pi05 or fast."""
    out = {f"PaliGemma/{name}": shape for name, shape in big_vision(s).items()}
    if kind == "fast":
        return out
    expert = tower(s, s.expert, s.expert_mlp, "_1", adaptive=kind == "pi05")
    out |= {f"PaliGemma/{name}": shape for name, shape in expert.items()}
    for name, (into, outof) in heads(s, kind).items():
        out |= {f"{name}/kernel": (into, outof), f"{name}/bias": (outof,)}
    return out


def heads(s: Sizes, kind: str) -> dict[str, tuple[int, int]]:
    e = s.expert
    out = {"action_in_proj": (s.actions, e), "action_out_proj": (e, s.actions)}
    if kind == "pi05":
        return out | {"time_mlp_in": (e, e), "time_mlp_out": (e, e)}
    return out | {
        "state_proj": (s.states, e),
        "action_time_mlp_in": (2 * e, e),
        "action_time_mlp_out": (e, e),
    }


def torch_tower(s: Sizes, width: int, mlp: int, prefix: str, *, adaptive: bool) -> Shapes:
    out: Shapes = {}
    norms = [f"{prefix}.norm"]
    for i in range(s.depth):
        layer = f"{prefix}.layers.{i}"
        out |= {
            f"{layer}.self_attn.q_proj.weight": (s.heads * s.head_dim, width),
            f"{layer}.self_attn.k_proj.weight": (s.kv * s.head_dim, width),
            f"{layer}.self_attn.v_proj.weight": (s.kv * s.head_dim, width),
            f"{layer}.self_attn.o_proj.weight": (width, s.heads * s.head_dim),
            f"{layer}.mlp.gate_proj.weight": (mlp, width),
            f"{layer}.mlp.up_proj.weight": (mlp, width),
            f"{layer}.mlp.down_proj.weight": (width, mlp),
        }
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    for norm in norms:
        if adaptive:
            out |= {f"{norm}.dense.weight": (3 * width, width), f"{norm}.dense.bias": (3 * width,)}
        else:
            out[f"{norm}.weight"] = (width,)
    return out


def torch_vision(s: Sizes, vision: str, projector: str) -> Shapes:
    d = s.vision
    out: Shapes = {
        f"{vision}.embeddings.patch_embedding.weight": (d, 3, s.patch, s.patch),
        f"{vision}.embeddings.patch_embedding.bias": (d,),
        f"{vision}.embeddings.position_embedding.weight": (s.patches, d),
        f"{vision}.post_layernorm.weight": (d,),
        f"{vision}.post_layernorm.bias": (d,),
        f"{projector}.linear.weight": (s.width, d),
        f"{projector}.linear.bias": (s.width,),
    }
    for i in range(s.vision_depth):
        layer = f"{vision}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= {f"{layer}.self_attn.{name}.weight": (d, d), f"{layer}.self_attn.{name}.bias": (d,)}
        for name in ("layer_norm1", "layer_norm2"):
            out |= {f"{layer}.{name}.{part}": (d,) for part in ("weight", "bias")}
        out |= {
            f"{layer}.mlp.fc1.weight": (s.vision_mlp, d),
            f"{layer}.mlp.fc1.bias": (s.vision_mlp,),
            f"{layer}.mlp.fc2.weight": (d, s.vision_mlp),
            f"{layer}.mlp.fc2.bias": (d,),
        }
    return out


#: (vision, projector, text) prefixes of the three generations, and of what transformers 5.23 saves.
PALIGEMMA = {
    "legacy": ("vision_tower.vision_model", "multi_modal_projector", "language_model.model"),
    "4.5x": ("model.vision_tower.vision_model", "model.multi_modal_projector", "model.language_model"),
    "5.x": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "5.23 saved": ("vision_tower", "multi_modal_projector", "language_model.model"),
}


def paligemma_hf(s: Sizes, names: str, rows: int) -> Shapes:
    vision, projector, text = PALIGEMMA[names]
    out = torch_vision(s, vision, projector) | torch_tower(s, s.width, s.mlp, text, adaptive=False)
    return out | {f"{text}.embed_tokens.weight": (rows, s.width)}


def torch_pi0(s: Sizes, kind: str, root: str, vision: str, text: str) -> Shapes:
    """LeRobot (root ``model.``), openpi's torch port (none) and the π0 of transformers; without token tables."""
    both = f"{root}paligemma_with_expert"
    base = f"{both}.paligemma.model"
    out = torch_vision(s, f"{base}.{vision}", f"{base}.multi_modal_projector")
    out |= torch_tower(s, s.width, s.mlp, f"{base}.{text}", adaptive=False)
    out |= torch_tower(s, s.expert, s.expert_mlp, f"{both}.gemma_expert.model", adaptive=kind == "pi05")
    out[f"{both}.gemma_expert.lm_head.weight"] = (s.vocab, s.expert)
    for name, (into, outof) in heads(s, kind).items():
        out |= {f"{root}{name}.weight": (outof, into), f"{root}{name}.bias": (outof,)}
    return out


def lerobot(s: Sizes, kind: str) -> Shapes:
    """As the public files are: the tied table is saved as the output projection only."""
    out = torch_pi0(s, kind, "model.", "vision_tower.vision_model", "language_model")
    return out | {"model.paligemma_with_expert.paligemma.lm_head.weight": (s.vocab, s.width)}


def random(shapes: Shapes, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return {name: rng.normal(size=shape).astype(kind) for name, shape in sorted(shapes.items())}


def save_small_openpi(folder, sizes: Sizes, kind: str) -> None:
    """Random weights, so small that sampled chunks stay near the noise."""
    arrays = random(openpi(sizes, kind))
    save_openpi(folder, {name: 0.05 * x for name, x in arrays.items()}, value=True)


def save_openpi(folder, arrays, *, value: bool) -> None:
    """As openpi saves: orbax's own writer, a tree below ``params``."""
    tree: dict = {}
    for name, array in arrays.items():
        *path, last = [*name.split("/"), *(["value"] if value else [])]
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = array
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), {"params": tree})


def save_safetensors(folder, arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
