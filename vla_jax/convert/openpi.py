"""π0, π0.5 and π0-FAST as openpi saves them: ``<checkpoint>/params`` by orbax, ``assets/<id>/norm_stats.json``.

The arrays are ours; the expert's lie among the decoder's with ``_1`` behind the name of the module, and the tree has
``params`` in front. Leaves that openpi itself saved end in ``/value``. LoRA is merged (`openpi_lora`). π0-FAST is a
backbone without an expert. The clock runs the other way: `time_flip`.
"""

import dataclasses
import json
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

from vla_jax.convert.entry import ArraySource, Entry, Lazy
from vla_jax.convert.formats import Opened, Options
from vla_jax.convert.model import config_from, joint_of, our_shapes
from vla_jax.convert.openpi_lora import MergedSource, has_lora
from vla_jax.convert.sources import OrbaxSource, read_json
from vla_jax.convert.stream import write_orbax
from vla_jax.convert.time_flip import flips
from vla_jax.data.robots.table import find_robot
from vla_jax.models.config import VLAConfig
from vla_jax.models.kinds import of_kind
from vla_jax.models.presets import PI0_CAMERAS

#: Cameras in the order of their tokens, in openpi's robots (policies/*.py); the second is π0-FAST's of DROID.
CAMERAS = (
    ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
)

#: Modules of the decoder that the expert has a second one of.
TOWER = r"(final_norm|q_einsum|kv_einsum|attn_vec_einsum|mlp|pre_attention_norm|pre_ffw_norm)"
HEADS = r"(action_in_proj|action_out_proj|state_proj|action_time_mlp_in|action_time_mlp_out|time_mlp_in|time_mlp_out)"


def to_openpi(name: str) -> str:
    """Our path as openpi's, without ``params`` and ``value``."""
    if name.startswith("backbone/"):
        return f"PaliGemma/{name.removeprefix('backbone/')}"
    name = name.removeprefix("expert/")
    if re.match(HEADS, name):
        return name
    return "PaliGemma/llm/" + re.sub(rf"(^|/){TOWER}(?=/)", r"\1\2_1", name, count=1)


def from_openpi(name: str) -> str:
    """The inverse of `to_openpi`; unknown names come back as they are."""
    if re.match(HEADS, name):
        return f"expert/{name}"
    if re.search(rf"(^|/){TOWER}_1/", name):
        return "expert/" + re.sub(
            rf"(^|/){TOWER}_1(?=/)", r"\1\2", name.removeprefix("PaliGemma/llm/"), count=1
        )
    return re.sub(r"^PaliGemma/", "backbone/", name)


def open_weights(path: Path, options: Options) -> Opened:
    """A checkpoint of openpi (a step's folder, or its ``params``). Raises FileNotFoundError or ValueError."""
    step = path.parent if path.name == "params" else path
    folder = step / "params"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: give a checkpoint of openpi, a folder with params in it"
        )
    source: ArraySource = OrbaxSource(folder)
    if has_lora(source.specs):
        source = MergedSource(source, path, 1.0 if options.lora_scale is None else options.lora_scale)
    elif options.lora_scale is not None:
        raise ValueError(f"--lora-scale {options.lora_scale} would do nothing: {path} has no LoRA")
    bare = {name: name.removeprefix("params/").removesuffix("/value") for name in source.specs}
    specs = {from_openpi(bare[name]): spec for name, spec in source.specs.items()}
    cameras = options.cameras or _cameras_of(options)
    model, expert = config_from(specs, where=path, cameras=cameras, horizon=options.chunk())
    if not expert:  # of openpi's, only π0-FAST has none: the decoder writes its actions
        model = dataclasses.replace(model, expert=of_kind(model.expert, "tokens", "model.expert"))
    front = "params/" if any(name.startswith("params/") for name in bare) else ""
    behind = "/value" if any(name.endswith("/value") for name in bare) else ""
    assets = {
        file.parent.relative_to(step / "assets").as_posix(): read_statistics(file)
        for file in sorted((step / "assets").rglob("norm_stats.json"))
    }
    return Opened(
        where=path,
        source=source,
        entries=table(model, expert, front, behind),
        model=model,
        expert=expert,
        assets={"norm_stats": assets} if assets else {},
        merged=source.merged if isinstance(source, MergedSource) else (),
    )


def _cameras_of(options: Options) -> tuple[str, ...]:
    """The order of openpi's cameras for a described robot that has them; else the usual names."""
    if options.policy is not None and options.policy.robot:
        named = set(find_robot(options.policy.robot).model_cameras)
        for cameras in CAMERAS:
            if named == set(cameras):
                return cameras
    return PI0_CAMERAS


def table(model: VLAConfig, expert: bool, front: str, behind: str) -> list[Entry]:
    """Every array of ours under openpi's name."""
    flip = flips(joint_of(model)) if expert else {}
    return [
        Entry(theirs=f"{front}{to_openpi(name)}{behind}", ours=name, flip=flip.get(name))
        for name in our_shapes(model, expert=expert)
    ]


def read_statistics(file: Path) -> dict[str, Any]:
    """``{"state"|"actions": {mean, std, q01, q99}}``; raises ValueError where something else is in the file."""
    found = read_json(file).get("norm_stats")
    if not isinstance(found, dict) or not {"state", "actions"} <= found.keys():
        raise ValueError(f"{file} has no norm_stats of state and actions")
    for name, part in found.items():
        if not isinstance(part, dict) or not {"mean", "std"} <= part.keys():
            raise ValueError(f"{file}: {name} has no mean and std")
        given = {kind: values for kind, values in part.items() if values is not None}
        for kind, values in given.items():
            if not isinstance(values, list) or not all(_is_number(x) for x in values):
                raise ValueError(f"{file}: {kind} of {name} is not a list of finite numbers")
        lengths = {len(values) for values in given.values()}
        if len(lengths) != 1:
            raise ValueError(f"{file}: the statistics of {name} are of different lengths {sorted(lengths)}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def export_table(model: VLAConfig, options: Options, *, expert: bool) -> list[Entry]:
    """The table that is written."""
    return table(model, expert, "", "/value" if options.value else "")


def write_weights(
    folder: Path, arrays: dict[str, Lazy], model: VLAConfig, options: Options, assets: dict[str, Any]
) -> None:
    """``params`` and, where the run has statistics of state and actions, ``assets``."""
    found = assets.get("norm_stats", {})
    for name in found:  # a task's, which may be anything
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(
                f"the statistics of {name!r} go into a folder of that name, and it can be no folder's"
            )
    write_orbax(folder / "params", arrays, ("params",))
    for name, statistics in found.items():
        file = folder / "assets" / name / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"norm_stats": statistics}, indent=2))
