"""The torch names of a backbone with an expert: what LeRobot, openpi's torch port and `transformers` have in common."""

import re
from collections.abc import Collection
from pathlib import Path

from vla_jax.convert.entry import Entry
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.hf_names import (
    Prefixes,
    Sizes,
    find_prefixes,
    gemma_entries,
    linear_entries,
    siglip_entries,
)
from vla_jax.convert.model import joint_of, paligemma_of
from vla_jax.convert.sources import SafetensorsSource
from vla_jax.convert.time_flip import flips
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.base import ExpertConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig

#: Names of the backbone and of the expert begin with one of these.
BACKBONE = r"(model\.)?(paligemma_with_expert\.paligemma|vlm)\."
EXPERT = r"(model\.)?(paligemma_with_expert\.gemma_expert|dit)\."

HEADS = ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out")
ADAPTIVE_HEADS = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")


def table(
    prefixes: Prefixes, embedding: str, expert: str, heads: dict[str, str], model: VLAConfig, rows: int
) -> list[Entry]:
    """Backbone, expert and heads (by our names of them)."""
    flip, adaptive = flips(joint_of(model)), joint_of(model).time == "adarms"
    entries = siglip_entries(prefixes, paligemma_of(model).vision.depth)
    entries.append(Entry(theirs=embedding, ours="backbone/llm/embedder/input_embedding", rows=rows))
    entries += gemma_entries(prefixes.text, "backbone/llm", paligemma_of(model).text.depth)
    entries += gemma_entries(expert, "expert", paligemma_of(model).text.depth, adaptive=adaptive)
    for ours, theirs in heads.items():
        entries += linear_entries(theirs, f"expert/{ours}", flip)
    return entries


def open_pi0(
    path: Path, source: SafetensorsSource, options: Options, *, adaptive: bool, towers, horizon: int
) -> Opened:
    """A π0 or π0.5 in torch's names; `towers(sizes, prefixes, rows)` gives (vision, text) configurations."""
    names = source.specs
    prefixes = find_prefixes(names, where=path, within=BACKBONE)
    sizes = Sizes(names, path)
    candidates = [f"{prefixes.text}.embed_tokens.weight", prefixes.head]
    present = [name for name in candidates if name in names]
    if not present:
        raise ValueError(f"{path} does not fit: 1 missing: {candidates[0]}")
    rows, _ = sizes.shape(present[0], 2)
    expert = _expert_prefix(names, path)
    heads = {name: _one(names, name, path) for name in (ADAPTIVE_HEADS if adaptive else HEADS)}
    vision, text = towers(sizes, prefixes, rows)
    model = VLAConfig(
        backbone=PaliGemmaConfig(vision=vision, text=text),
        expert=_expert(sizes, expert, heads, adaptive, horizon),
        cameras=options.cameras,
        dtype="bfloat16",
        remat="nothing_saveable",
    )
    unused = {
        name
        for name in names
        if re.match(EXPERT, name) and re.search(r"(lm_head|embed_tokens)\.weight$", name)
    }
    return Opened(
        where=path,
        source=source,
        entries=table(prefixes, present[0], expert, heads, model, rows),
        model=model,
        expert=True,
        copies={copy: present[0] for copy in present[1:]},
        unused=frozenset(unused),
    )


def _expert(sizes: Sizes, prefix: str, heads: dict[str, str], adaptive: bool, horizon: int) -> ExpertConfig:
    width, actions = sizes.shape(f"{heads['action_in_proj']}.weight", 2)
    state = actions if adaptive else sizes.shape(f"{heads['state_proj']}.weight", 2)[1]
    return JointConfig(
        width=width,
        mlp=sizes.shape(f"{prefix}.layers.0.mlp.down_proj.weight", 2)[1],
        time="adarms" if adaptive else "mlp",
        clock="reversed",
        state_token=not adaptive,
        horizon=horizon,
        action_dim=actions,
        state_dim=state,
        padding="noise",
    )


def _expert_prefix(names: Collection[str], where: Path) -> str:
    last = ".layers.0.self_attn.q_proj.weight"
    found = [name.removesuffix(last) for name in names if re.match(EXPERT, name) and name.endswith(last)]
    if len(found) != 1:
        raise ValueError(f"{where} has {len(found) or 'no'} action expert: these are not weights of a π0")
    return found[0]


def _one(names: Collection[str], layer: str, where: Path) -> str:
    """The full name of a linear layer by its last part."""
    found = [n.removesuffix(".weight") for n in names if re.search(rf"(^|\.){layer}\.weight$", n)]
    if len(found) != 1:
        raise ValueError(f"{where} does not fit: {len(found) or 'no'} {layer}.weight")
    return found[0]


Towers = tuple[VisionConfig, TextConfig]
