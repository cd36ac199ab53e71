"""π0 and π0.5 as LeRobot saves them: model.safetensors, config.json, and the processors' statistics.

Weights have the torch names (`torch_pi0`), with ``model.`` in front. The statistics lie in safetensors files beside
policy_preprocessor.json, one array per feature and kind. The clock runs the other way: `time_flip`.
"""

from pathlib import Path
from typing import Any

from vla_jax.convert.entry import checked
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.sources import SafetensorsSource, beside, read_json
from vla_jax.convert.torch_pi0 import open_pi0
from vla_jax.models.presets import PI0_CAMERAS

#: Query heads of the variants that LeRobot names, and of its one image encoder: shapes don't say them.
TEXT_HEADS = {"gemma_2b": 8, "gemma_300m": 8}
VISION_HEADS = 16
PREPROCESSOR = "policy_preprocessor.json"


def open_weights(path: Path, options: Options) -> Opened:
    """A policy of LeRobot. Raises FileNotFoundError or ValueError."""
    file = path / "config.json"
    config = read_json(file)
    kind = config.get("type")
    if kind not in ("pi0", "pi05"):
        raise ValueError(f"{file} is of a policy of type {kind!r}; pi0 and pi05 are read here")
    variant = config.get("paligemma_variant", "gemma_2b")
    if variant not in TEXT_HEADS:
        raise ValueError(
            f"{file}: paligemma_variant {variant!r} is not known; there are {', '.join(TEXT_HEADS)}"
        )
    for name, value in {"min_period": 4e-3, "max_period": 4.0}.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: {name}={config[name]}; the expert here has {value}")
    seen = config.get("input_features") or {}
    cameras = tuple(
        name.removeprefix("observation.images.") for name, f in seen.items() if f.get("type") == "VISUAL"
    )

    def towers(sizes, prefixes, rows):
        vision = sizes.vision(prefixes.vision, VISION_HEADS)
        return vision, sizes.text(prefixes.text, TEXT_HEADS[variant], rows)

    opened = open_pi0(
        path,
        SafetensorsSource(path),
        Options(**{**vars(options), "cameras": options.cameras or cameras or PI0_CAMERAS}),
        adaptive=kind == "pi05",
        towers=towers,
        horizon=options.chunk(config.get("chunk_size"), file),
    )
    return Opened(**{**vars(opened), "assets": {"lerobot": {"config": config, **read_processors(path)}}})


def read_processors(path: Path) -> dict[str, Any]:
    """The preprocessor's steps, and its statistics as ``{feature: {kind: values}}``; nothing where there is none."""
    if not (path / PREPROCESSOR).is_file():
        return {}
    preprocessor = read_json(path / PREPROCESSOR)
    statistics: dict[str, dict[str, Any]] = {}
    for step in preprocessor.get("steps", []):
        if "state_file" not in step:
            continue
        file = beside(path, step["state_file"], f"{PREPROCESSOR} names the file")
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {PREPROCESSOR} names it")
        state = SafetensorsSource(file)
        for name in state.specs:
            feature, _, kind = name.rpartition(".")
            statistics.setdefault(feature, {})[kind] = checked(name, state.read(name)).tolist()
    return {"preprocessor": preprocessor, "statistics": statistics}
