"""The sizes of our model: its arrays' shapes from a configuration, and the configuration from shapes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.convert.entry import ArraySpec, Shape
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.base import ExpertConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.vla import VLA
from vla_jax.types import Batch


@functools.cache
def our_shapes(config: VLAConfig, *, expert: bool) -> dict[str, Shape]:
    """Shapes by path, as ``backbone/img/…``; without `expert` only the backbone's. Computes nothing."""
    if not expert:  # what the data set will decide makes no difference to the backbone
        config = dataclasses.replace(
            config, expert=dataclasses.replace(config.expert, action_dim=1, state_dim=1)
        )
    e, size = config.expert, config.backbone.image_size

    def abstract(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *shape), dtype)  # sizes come from files: nothing is allocated by them

    text = abstract(jnp.bool_, 1)
    arrays: dict[str, Any] = dict(
        images={name: abstract(jnp.uint8, size, size, 3) for name in config.cameras},
        image_mask={name: abstract(jnp.bool_) for name in config.cameras},
        state=abstract(jnp.float32, e.state_dim),
        tokens=abstract(jnp.int32, 1),
        token_mask=text,
        token_causal=text,
        token_loss=text,
    )
    batch = Batch(**arrays)
    key = jax.eval_shape(lambda: jax.random.key(0))
    noise = abstract(jnp.float32, e.horizon, e.action_dim)
    tree = jax.eval_shape(VLA(config).init, key, batch, noise, abstract(jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(tree)["params"])
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    return {name: shape for name, shape in shapes.items() if expert or name.startswith("backbone/")}


def paligemma_of(model: VLAConfig) -> PaliGemmaConfig:
    """The backbone, for formats that hold PaliGemmas. Raises ValueError where it is another kind."""
    if not isinstance(model.backbone, PaliGemmaConfig):
        raise ValueError(
            f"this format holds PaliGemmas; this model's backbone is of kind {model.backbone.kind}"
        )
    return model.backbone


def joint_of(model: VLAConfig) -> JointConfig:
    """The expert, for formats that hold π0's. Raises ValueError where it is another kind."""
    if not isinstance(model.expert, JointConfig):
        raise ValueError(f"this format holds π0's expert; this model's is of kind {model.expert.kind}")
    return model.expert


def new_expert(text: TextConfig, horizon: int) -> ExpertConfig:
    """π0's proportions beside any decoder: what is to be trained where weights have no expert."""
    width, mlp = max(2, text.width // 4 * 2), max(1, text.mlp // 4)
    return JointConfig(width=width, mlp=mlp, clock="reversed", horizon=horizon)


def _towers(shape: Callable[[str, int], Shape]) -> PaliGemmaConfig:
    """The backbone's sizes; `shape` gives the shape of an array by its name and number of axes."""
    img, llm = "backbone/img", "backbone/llm"
    patch, _, _, width = shape(f"{img}/embedding/kernel", 4)
    _, tokens, _ = shape(f"{img}/pos_embedding", 3)
    block = f"{img}/Transformer/encoderblock"
    depth, _, vision_heads, _ = shape(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    vision = VisionConfig(
        image_size=math.isqrt(tokens) * patch,
        patch=patch,
        width=width,
        depth=depth,
        mlp=shape(f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2],
        heads=vision_heads,
    )
    vocab, text_width = shape(f"{llm}/embedder/input_embedding", 2)
    layers, heads, _, head_dim = shape(f"{llm}/layers/attn/q_einsum/w", 4)
    text = TextConfig(
        vocab=vocab,
        width=text_width,
        depth=layers,
        mlp=shape(f"{llm}/layers/mlp/linear", 3)[1],
        heads=heads,
        kv_heads=shape(f"{llm}/layers/attn/kv_einsum/w", 5)[2],
        head_dim=head_dim,
    )
    return PaliGemmaConfig(vision=vision, text=text)


def config_from(
    specs: Mapping[str, ArraySpec], *, where: object, cameras: tuple[str, ...], horizon: int
) -> tuple[VLAConfig, bool]:
    """The configuration whose arrays have these names of ours, and whether an expert is among them.

    What the shapes don't say are the cameras and the horizon. Raises ValueError where a name is missing that a
    size is read from.
    """

    def shape(name: str, axes: int) -> Shape:
        if name not in specs:
            raise ValueError(f"{where} does not fit: 1 missing: {name}; are these weights of a PaliGemma?")
        if len(specs[name].shape) != axes:
            raise ValueError(f"{where} does not fit: {name} {specs[name].shape} should have {axes} axes")
        return specs[name].shape

    backbone = _towers(shape)
    text = backbone.text
    config = VLAConfig(
        backbone=backbone,
        cameras=cameras,
        dtype="bfloat16",
        remat="nothing_saveable",
    )
    if not any(name.startswith("expert/") for name in specs):
        return dataclasses.replace(config, expert=new_expert(text, horizon)), False
    actions, expert_width = shape("expert/action_in_proj/kernel", 2)
    state = "expert/state_proj/kernel" in specs
    expert = JointConfig(
        width=expert_width,
        mlp=shape("expert/layers/mlp/linear", 3)[1],
        time="adarms" if "expert/time_mlp_in/kernel" in specs else "mlp",
        clock="reversed",
        state_token=state,
        horizon=horizon,
        action_dim=actions,
        state_dim=shape("expert/state_proj/kernel", 2)[0] if state else actions,
        padding="noise",
    )
    return dataclasses.replace(config, expert=expert), True
