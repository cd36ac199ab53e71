"""PaliGemma, and a Gemma expert beside it, under the names of torch libraries.

A torch linear layer is [out, in], layers are numbered one by one, and heads are merged into one axis. What the
libraries and their generations disagree on are the prefixes; they are found by the arrays below them.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vla_jax.convert.entry import ArraySpec, Entry
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.gemma import TextConfig

TRANSPOSED = (1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Where the parts of a PaliGemma are; each ends before a dot."""

    vision: str
    projector: str
    text: str
    head: str
    """The output projection, tied to the embedding: written by nobody, tolerated where it is a copy."""


def find_prefixes(names: Collection[str], *, where: object, within: str = "") -> Prefixes:
    """The prefixes used in a file; `within` is a part of the name that all of the backbone's have."""
    inside = [name for name in names if re.match(within, name)]

    def before(pattern: str, what: str) -> str:
        found = {m.group(1) for name in inside if (m := re.fullmatch(rf"(.*?)\.?{pattern}", name))}
        found = {
            prefix for prefix in found if not prefix.endswith("encoder")
        }  # the image encoder's own layers
        if len(found) != 1:
            raise ValueError(f"{where} has {len(found) or 'no'} {what}: these are not weights of a PaliGemma")
        return found.pop()

    heads = [name for name in inside if name.endswith("lm_head.weight")]
    return Prefixes(
        vision=before(r"embeddings\.patch_embedding\.weight", "patch embedding"),
        projector=before(r"linear\.weight", "projector"),
        text=before(r"layers\.0\.self_attn\.q_proj\.weight", "decoder"),
        head=heads[0] if heads else "lm_head.weight",
    )


def siglip_entries(prefixes: Prefixes, depth: int) -> list[Entry]:
    """The image encoder and the projection of its outputs."""
    v, ours = prefixes.vision, "backbone/img"
    entries = [
        Entry(
            theirs=f"{v}.embeddings.patch_embedding.weight",
            ours=f"{ours}/embedding/kernel",
            order=(3, 2, 0, 1),
        ),
        Entry(theirs=f"{v}.embeddings.patch_embedding.bias", ours=f"{ours}/embedding/bias"),
        Entry(theirs=f"{v}.embeddings.position_embedding.weight", ours=f"{ours}/pos_embedding", index=(0,)),
        Entry(theirs=f"{v}.post_layernorm.weight", ours=f"{ours}/Transformer/encoder_norm/scale"),
        Entry(theirs=f"{v}.post_layernorm.bias", ours=f"{ours}/Transformer/encoder_norm/bias"),
        Entry(theirs=f"{prefixes.projector}.linear.weight", ours=f"{ours}/head/kernel", order=TRANSPOSED),
        Entry(theirs=f"{prefixes.projector}.linear.bias", ours=f"{ours}/head/bias"),
    ]
    block = f"{ours}/Transformer/encoderblock"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for i in range(depth):
        layer = f"{v}.encoder.layers.{i}"
        at: dict[str, Any] = {"index": (i,)}
        for theirs, norm in (("layer_norm1", "LayerNorm_0"), ("layer_norm2", "LayerNorm_1")):
            entries += [
                Entry(theirs=f"{layer}.{theirs}.weight", ours=f"{block}/{norm}/scale", **at),
                Entry(theirs=f"{layer}.{theirs}.bias", ours=f"{block}/{norm}/bias", **at),
            ]
        for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            kernel: dict[str, Any] = dict(
                ours=f"{attention}/{name}/kernel", order=(1, 2, 0), groups=(2, 1), **at
            )
            bias: dict[str, Any] = dict(ours=f"{attention}/{name}/bias", groups=(2,), **at)
            entries += [
                Entry(theirs=f"{layer}.self_attn.{theirs}.weight", **kernel),
                Entry(theirs=f"{layer}.self_attn.{theirs}.bias", **bias),
            ]
        kernel = dict(ours=f"{attention}/out/kernel", order=(2, 0, 1), groups=(1, 2), **at)
        entries += [
            Entry(theirs=f"{layer}.self_attn.out_proj.weight", **kernel),
            Entry(theirs=f"{layer}.self_attn.out_proj.bias", ours=f"{attention}/out/bias", **at),
        ]
        for theirs, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            kernel = dict(ours=f"{block}/MlpBlock_0/{name}/kernel", order=TRANSPOSED, **at)
            entries += [
                Entry(theirs=f"{layer}.mlp.{theirs}.weight", **kernel),
                Entry(theirs=f"{layer}.mlp.{theirs}.bias", ours=f"{block}/MlpBlock_0/{name}/bias", **at),
            ]
    return entries


def gemma_entries(prefix: str, ours: str, depth: int, *, adaptive: bool = False) -> list[Entry]:
    """A tower of Gemma's blocks; with `adaptive` norms a linear layer `dense` in each norm."""
    entries = _norm(f"{prefix}.norm", f"{ours}/final_norm", {}, adaptive)
    for i in range(depth):
        layer, attn = f"{prefix}.layers.{i}", f"{ours}/layers/attn"
        parts = {
            "self_attn.q_proj": dict(ours=f"{attn}/q_einsum/w", index=(i,), order=(0, 2, 1), groups=(2, 1)),
            "self_attn.k_proj": dict(
                ours=f"{attn}/kv_einsum/w", index=(i, 0), order=(0, 2, 1), groups=(2, 1)
            ),
            "self_attn.v_proj": dict(
                ours=f"{attn}/kv_einsum/w", index=(i, 1), order=(0, 2, 1), groups=(2, 1)
            ),
            "self_attn.o_proj": dict(
                ours=f"{attn}/attn_vec_einsum/w", index=(i,), order=(2, 0, 1), groups=(1, 2)
            ),
            "mlp.gate_proj": dict(ours=f"{ours}/layers/mlp/gating_einsum", index=(i, 0), order=TRANSPOSED),
            "mlp.up_proj": dict(ours=f"{ours}/layers/mlp/gating_einsum", index=(i, 1), order=TRANSPOSED),
            "mlp.down_proj": dict(ours=f"{ours}/layers/mlp/linear", index=(i,), order=TRANSPOSED),
        }
        entries += [Entry(theirs=f"{layer}.{name}.weight", **part) for name, part in parts.items()]
        for theirs, name in (
            ("input_layernorm", "pre_attention_norm"),
            ("post_attention_layernorm", "pre_ffw_norm"),
        ):
            entries += _norm(f"{layer}.{theirs}", f"{ours}/layers/{name}", dict(index=(i,)), adaptive)
    return entries


def _norm(theirs: str, ours: str, at: dict, adaptive: bool) -> list[Entry]:
    if not adaptive:
        return [Entry(theirs=f"{theirs}.weight", ours=f"{ours}/scale", **at)]
    return [
        Entry(theirs=f"{theirs}.dense.weight", ours=f"{ours}/Dense_0/kernel", order=TRANSPOSED, **at),
        Entry(theirs=f"{theirs}.dense.bias", ours=f"{ours}/Dense_0/bias", **at),
    ]


def linear_entries(theirs: str, ours: str, flips: Mapping) -> list[Entry]:
    """A linear layer and its bias, flipped where the clock asks for it."""
    kernel, bias = f"{ours}/kernel", f"{ours}/bias"
    return [
        Entry(theirs=f"{theirs}.weight", ours=kernel, order=TRANSPOSED, flip=flips.get(kernel)),
        Entry(theirs=f"{theirs}.bias", ours=bias, flip=flips.get(bias)),
    ]


class Sizes:
    """Sizes read off arrays in torch's layout; what shapes do not say are the numbers of heads."""

    def __init__(self, specs: Mapping[str, ArraySpec], where: object):
        self.specs, self.where = specs, where

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an array that must be there."""
        if name not in self.specs or len(self.specs[name].shape) != axes:
            found = f"{self.specs[name].shape}" if name in self.specs else "missing"
            raise ValueError(f"{self.where} does not fit: {name} with {axes} axes is wanted, it is {found}")
        return self.specs[name].shape

    def depth(self, prefix: str) -> int:
        """How many numbered layers there are under a prefix."""
        pattern = re.compile(re.escape(f"{prefix}.layers.") + r"(\d+)\.")
        return len({m.group(1) for name in self.specs if (m := pattern.match(name))})

    def vision(self, prefix: str, heads: int) -> VisionConfig:
        """The encoder's sizes."""
        width, _, patch, _ = self.shape(f"{prefix}.embeddings.patch_embedding.weight", 4)
        tokens, _ = self.shape(f"{prefix}.embeddings.position_embedding.weight", 2)
        return VisionConfig(
            image_size=math.isqrt(tokens) * patch,
            patch=patch,
            width=width,
            depth=self.depth(f"{prefix}.encoder"),
            mlp=self.shape(f"{prefix}.encoder.layers.0.mlp.fc1.weight", 2)[0],
            heads=heads,
        )

    def text(self, prefix: str, heads: int, vocab: int) -> TextConfig:
        """The decoder's sizes."""
        layer = f"{prefix}.layers.0"
        inner, width = self.shape(f"{layer}.self_attn.q_proj.weight", 2)
        if inner % heads:
            raise ValueError(
                f"{self.where}: {inner} outputs of {layer}.self_attn.q_proj are not {heads} heads"
            )
        head_dim = inner // heads
        return TextConfig(
            vocab=vocab,
            width=width,
            depth=self.depth(prefix),
            mlp=self.shape(f"{layer}.mlp.down_proj.weight", 2)[1],
            heads=heads,
            kv_heads=self.shape(f"{layer}.self_attn.k_proj.weight", 2)[0] // head_dim,
            head_dim=head_dim,
        )
