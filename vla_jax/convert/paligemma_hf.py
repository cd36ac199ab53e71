"""PaliGemma as `transformers` saves it: safetensors, one or several, and config.json.

Three generations of names are read, in any mixture of their prefixes, and one of them is written. The embedding has
rows for tokens that the text model never writes (``<image>`` and fill, 257,216 in all): cut off on the way in, zeros
on the way out.
"""

import json
from pathlib import Path
from typing import Any

from vla_jax.convert.entry import Entry, Lazy
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.hf_names import Prefixes, Sizes, find_prefixes, gemma_entries, siglip_entries
from vla_jax.convert.model import new_expert, paligemma_of
from vla_jax.convert.sources import SafetensorsSource, read_json
from vla_jax.convert.stream import write_safetensors
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig

GENERATIONS = {
    "legacy": Prefixes(
        vision="vision_tower.vision_model",
        projector="multi_modal_projector",
        text="language_model.model",
        head="language_model.lm_head.weight",
    ),
    "4.5x": Prefixes(
        vision="model.vision_tower.vision_model",
        projector="model.multi_modal_projector",
        text="model.language_model",
        head="lm_head.weight",
    ),
    "5.x": Prefixes(
        vision="model.vision_tower",
        projector="model.multi_modal_projector",
        text="model.language_model",
        head="lm_head.weight",
    ),
}


def table(prefixes: Prefixes, model: VLAConfig, rows: int) -> list[Entry]:
    """The backbone under these prefixes, with as many rows of the embedding as they have."""
    embedding = Entry(
        theirs=f"{prefixes.text}.embed_tokens.weight", ours="backbone/llm/embedder/input_embedding", rows=rows
    )
    text = gemma_entries(prefixes.text, "backbone/llm", paligemma_of(model).text.depth)
    return [*siglip_entries(prefixes, paligemma_of(model).vision.depth), embedding, *text]


def open_weights(path: Path, options: Options) -> Opened:
    """The backbone in a folder of transformers. Raises FileNotFoundError or ValueError."""
    config = read_json(path / "config.json")
    if config.get("model_type") != "paligemma":
        raise ValueError(
            f"{path / 'config.json'} is of model_type {config.get('model_type')!r}, not 'paligemma'"
        )
    source = SafetensorsSource(path)
    prefixes = find_prefixes(source.specs, where=path)
    sizes = Sizes(source.specs, path)
    embedding = f"{prefixes.text}.embed_tokens.weight"
    rows, _ = sizes.shape(embedding, 2)
    vision, text = read_towers(config, sizes, prefixes, rows, path / "config.json")
    expert = new_expert(text, options.chunk())
    model = VLAConfig(
        backbone=PaliGemmaConfig(vision=vision, text=text),
        expert=expert,
        cameras=options.cameras or ("image",),
        dtype="bfloat16",
        remat="nothing_saveable",
    )
    copies = {prefixes.head: embedding} if prefixes.head in source.specs else {}
    entries = table(prefixes, model, rows)
    return Opened(where=path, source=source, entries=entries, model=model, expert=False, copies=copies)


def read_towers(config: dict[str, Any], sizes: Sizes, prefixes: Prefixes, rows: int, where: Path):
    """(vision, text) configurations: heads and vocabulary from config.json, everything else from shapes."""
    found = {}
    for part in ("vision_config", "text_config"):
        heads = config.get(part, {}).get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"{where} has no {part}.num_attention_heads")
        found[part] = heads
    image = config.get("image_token_index", config.get("image_token_id"))
    vocab = min(rows, image) if isinstance(image, int) else rows
    vision = sizes.vision(prefixes.vision, found["vision_config"])
    return vision, sizes.text(prefixes.text, found["text_config"], vocab)


def write_weights(
    folder: Path, arrays: dict[str, Lazy], model: VLAConfig, options: Options, assets: dict[str, Any]
) -> None:
    """The arrays of `export_table` as safetensors, and a config.json."""
    write_safetensors(folder, arrays, options.max_file_bytes)
    dtype = arrays[next(iter(arrays))].dtype.name
    (folder / "config.json").write_text(json.dumps(config_json(model, padded_rows(model), dtype), indent=2))


def export_table(model: VLAConfig, options: Options, *, expert: bool) -> list[Entry]:
    """The table that is written."""
    del expert  # one that is there is left out, as `convert` says
    if options.names not in GENERATIONS:
        raise ValueError(f"names={options.names!r}: there are {', '.join(GENERATIONS)}")
    return table(GENERATIONS[options.names], model, padded_rows(model))


def padded_rows(model: VLAConfig) -> int:
    """Rows of their embedding: one more for ``<image>``, filled up to a multiple of 64."""
    return -(-(paligemma_of(model).text.vocab + 1) // 64) * 64


def config_json(model: VLAConfig, rows: int, dtype: str) -> dict[str, Any]:
    """What `PaliGemmaConfig` needs to know."""
    v, t = paligemma_of(model).vision, paligemma_of(model).text
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "dtype": dtype,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": t.width,
        "image_token_index": t.vocab,
        "projection_dim": t.width,
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": v.width,
            "image_size": v.image_size,
            "intermediate_size": v.mlp,
            "num_attention_heads": v.heads,
            "num_hidden_layers": v.depth,
            "num_image_tokens": v.tokens,
            "patch_size": v.patch,
            "projection_dim": t.width,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "gemma",
            "head_dim": t.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": t.width,
            "intermediate_size": t.mlp,
            "num_attention_heads": t.heads,
            "num_hidden_layers": t.depth,
            "num_image_tokens": v.tokens,
            "num_key_value_heads": t.kv_heads,
            "tie_word_embeddings": True,
            "vocab_size": rows,
        },
    }
