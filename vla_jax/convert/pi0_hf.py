"""π0 as `transformers` saves its PI0ForConditionalGeneration: safetensors under the hub's names, and config.json.

The expert there has a token table of its own that nothing reads: left out on the way in, zeros on the way out. Its
clock runs the other way (`time_flip`): pass it timestep = 1 - t, and its velocity is minus ours.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.convert.entry import Entry, Lazy, row_slices, rows_of
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.hf_names import Prefixes
from vla_jax.convert.model import joint_of, paligemma_of
from vla_jax.convert.paligemma_hf import config_json, read_towers
from vla_jax.convert.sources import SafetensorsSource, read_json
from vla_jax.convert.stream import write_safetensors
from vla_jax.convert.torch_pi0 import HEADS, open_pi0, table
from vla_jax.models.config import VLAConfig
from vla_jax.models.presets import PI0_CAMERAS

_ROOT = "paligemma_with_expert"
#: The names that are written: those of the public files, which every version of transformers with a π0 reads.
NAMES = Prefixes(
    vision=f"{_ROOT}.paligemma.model.vision_tower",
    projector=f"{_ROOT}.paligemma.model.multi_modal_projector",
    text=f"{_ROOT}.paligemma.model.language_model.model",
    head=f"{_ROOT}.paligemma.lm_head.weight",
)
EXPERT = f"{_ROOT}.gemma_expert.model"
UNUSED = f"{_ROOT}.gemma_expert.lm_head.weight"


def open_weights(path: Path, options: Options) -> Opened:
    """A π0 in a folder of transformers. Raises FileNotFoundError or ValueError."""
    file = path / "config.json"
    config = read_json(file)
    if config.get("model_type") != "pi0" or "vlm_config" not in config:
        raise ValueError(
            f"{file} is not of a PI0ForConditionalGeneration (model_type {config.get('model_type')!r})"
        )
    wanted = {"min_period": 4e-3, "max_period": 4.0}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: {name}={config[name]}; the expert here has {value}")

    def towers(sizes, prefixes, rows):
        return read_towers(config["vlm_config"], sizes, prefixes, rows, file)

    options = Options(**{**vars(options), "cameras": options.cameras or PI0_CAMERAS})
    horizon = options.chunk(config.get("chunk_size"), file)
    return open_pi0(path, SafetensorsSource(path), options, adaptive=False, towers=towers, horizon=horizon)


def export_table(model: VLAConfig, options: Options, *, expert: bool) -> list[Entry]:
    """The table that is written; ValueError where the model is not a π0."""
    if not expert:
        raise ValueError("pi0_hf holds π0 only; these weights have no expert")
    if joint_of(model).time != "mlp" or not joint_of(model).state_token:
        raise ValueError("pi0_hf holds π0 only; this model's time or state enters in another way")
    heads = {name: name for name in HEADS}
    return table(
        NAMES, f"{NAMES.text}.embed_tokens.weight", EXPERT, heads, model, paligemma_of(model).text.vocab
    )


def write_weights(
    folder: Path, arrays: dict[str, Lazy], model: VLAConfig, options: Options, assets: dict[str, Any]
) -> None:
    """Weights and config.json."""
    dtype = arrays[next(iter(arrays))].dtype
    shape = (paligemma_of(model).text.vocab, joint_of(model).width)

    def zeros():
        for rows in row_slices(shape, dtype.itemsize):
            yield rows, np.zeros((rows_of(rows).stop - rows_of(rows).start, *shape[1:]), dtype)

    write_safetensors(folder, arrays | {UNUSED: Lazy(shape, dtype, zeros)}, options.max_file_bytes)
    e, t = joint_of(model), paligemma_of(model).text
    vlm = config_json(model, t.vocab, dtype.name)
    config = {
        "architectures": ["PI0ForConditionalGeneration"],
        "model_type": "pi0",
        "dtype": dtype.name,
        "chunk_size": e.horizon,
        "max_action_dim": e.action_dim,
        "max_state_dim": e.state_dim,
        "min_period": 4e-3,
        "max_period": 4.0,
        "vlm_config": {key: vlm[key] for key in vlm if key not in ("architectures", "dtype")},
        "dit_config": {
            "model_type": "gemma",
            "head_dim": t.head_dim,
            "hidden_size": e.width,
            "intermediate_size": e.mlp,
            "num_attention_heads": t.heads,
            "num_hidden_layers": t.depth,
            "num_key_value_heads": t.kv_heads,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
