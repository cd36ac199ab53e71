"""What makes converted weights a policy: a tokenizer that is given, and the statistics that lay beside the weights.

The files say nothing of images' sizes on the robot, of the control rate, or of what a family does to actions before
normalising them (openpi's configurations often make them relative to the state). A robot's description says all of it
(`data.robots`); without one, actions come out as they were normalised.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import TrainConfig, prompt_form
from vla_jax.convert.fast_policy import read_fast, sized, tokenize_actions
from vla_jax.convert.lerobot_processor import STATE_IN_PROMPT, affine, read_preprocessing
from vla_jax.convert.robot_dims import lerobot_dims, robot_dims
from vla_jax.convert.statistics import openpi_method
from vla_jax.data import transforms as tf
from vla_jax.data.bundle import DataBundle
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.normalize import Normalize
from vla_jax.data.robot_data import select_of
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.robots.description import Field, RobotDescription
from vla_jax.data.robots.table import find_robot
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.statistics import FieldStatistics, Statistics
from vla_jax.data.tokenizer import Tokenizer
from vla_jax.data.tokenizer_files import read_tokenizer
from vla_jax.finite import finite
from vla_jax.models.config import VLAConfig
from vla_jax.objectives.config import ObjectiveConfig

TEXT_TOKENS = {"pi0": 48, "pi05": 200, "fast": 250}
"""Longest prompts, as in openpi (π0-FAST's with the action tokens)."""
LEROBOT = "lerobot"
"""The name of the statistics in LeRobot's preprocessor, and of what else it says."""
FIELDS: tuple[Field, ...] = ("state", "actions")
EPSILON = 1e-6
"""What openpi adds to deviations and to differences of quantiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class PolicyOptions:
    """What the files do not say."""

    tokenizer: Path
    """tokenizer.json or a sentencepiece .model, or the folder of one."""
    statistics: str = ""
    """Which of several statistics beside the weights; empty: the only ones."""
    control_hz: float | None = None
    """Steps per second of the robot; None: the described robot's, or 20."""
    robot: str = ""
    """The robot that the policy acts on, by name or by a .json file (`data.robots.table`): its entries of messages, its
    units, its dimensions. Empty: states and actions as the statistics have them."""
    state_dims: int | None = None
    """Dims of the robot's state, where no robot is named; the statistics behind them are of padding. None: a file's
    word, or all that the statistics have where they don't look padded."""
    action_dims: int | None = None
    """The same of its actions."""
    default_prompt: str = ""
    """The robot's instruction where a request has none; empty: its description's."""
    state_in_prompt: bool = True
    """Whether a π0.5 reads the state in its prompt. openpi's pi05_libero does not (discrete_state_input=False): it
    reads the instruction alone, and nothing tells it the state."""
    fast: Path | None = None
    """π0-FAST: the folder of its FAST tokenizer (tokenizer.json, processor_config.json)."""


def public_data(model: VLAConfig) -> DataConfig:
    """Prompt, normalisation and image size of the public model that is built like this one.

    openpi and LeRobot write a state below -1 as "-1", and those models were trained so.
    """
    form = prompt_form(model)
    return DataConfig(
        prompt=form,
        prompt_clip_state=False,
        max_text_tokens=TEXT_TOKENS[form],
        normalization=openpi_method(model),
        image_size=model.backbone.image_size,
        cameras=model.cameras,
    )


def public_objective(model: VLAConfig) -> ObjectiveConfig:
    """What the public model that is built like this one learned of padded action dims."""
    return ObjectiveConfig(padding_loss=model.expert.padding == "noise")


def policy_data(
    model: VLAConfig, assets: Mapping[str, Any], options: PolicyOptions, horizon: int | None = None
) -> tuple[TrainConfig, DataBundle]:
    """The configuration and the transforms of a π0, π0.5 or π0-FAST. Raises ValueError or FileNotFoundError.

    `horizon`: the actions of a chunk, where it was given; a π0-FAST's weights do not say it.
    """
    fast = read_fast(options.fast, model)
    data = public_data(model)
    name, raw = _choose(assets, options.statistics)
    fields, data = _normalisation(assets, name, raw, data, options)
    robot = _robot(options)
    if robot is None:
        said = lerobot_dims(assets[LEROBOT]) if name == LEROBOT else {}
        fields = _of_dims(fields, raw, model, options, said)
    else:
        fields = {field: _of_robot(field, pair, robot, name) for field, pair in fields.items()}
        data = dataclasses.replace(data, robot=options.robot, cameras=())
    if not options.state_in_prompt:
        data = _without_state(data, fast=fast is not None)
    statistics = Statistics(state=_statistics(*fields["state"]), action=_statistics(*fields["actions"]))
    if fast is not None:
        dims = {"state_dim": statistics.state.dims, "action_dim": statistics.action.dims}
        model = sized(model, fast, horizon=horizon, **dims)
    _check_dims(statistics, model, name)
    tokenizer = _tokenizer(options.tokenizer, model)
    as_tokens = None
    if fast is not None:
        as_tokens = tokenize_actions(model, tokenizer, fast)
        data = dataclasses.replace(data, fast=dataclasses.replace(data.fast, max_tokens=as_tokens.max_tokens))
    schema = _schema(model, statistics, options, robot, name)
    transforms = _transforms(model, data, statistics, schema, robot, tokenizer, as_tokens)
    objective = dataclasses.replace(public_objective(model), text=False, plan_visible=0.0)
    config = TrainConfig(model=model, data=data, objective=objective)
    return config, DataBundle(schema=schema, transforms=transforms)


def _normalisation(
    assets: Mapping[str, Any], name: str, raw: Mapping[str, Any], data: DataConfig, options: PolicyOptions
) -> tuple[dict[Field, tuple[np.ndarray, np.ndarray]], DataConfig]:
    """Offset and scale of state and actions, by LeRobot's formulas or openpi's, and what LeRobot says of the prompt."""
    if name != LEROBOT:
        method = data.normalization
        return {f: _openpi_affine(raw[f], method, f"{name}: {f}") for f in FIELDS}, data
    said = read_preprocessing(assets[LEROBOT])
    if said.prompt_state_dim and not options.state_in_prompt:
        raise ValueError(
            f"the preprocessor's {STATE_IN_PROMPT} puts the state into the prompt; leave --no-state-in-prompt out"
        )
    fields: dict[Field, tuple[np.ndarray, np.ndarray]] = {
        f: affine(raw[f], said.modes[f], said.eps, f"{name}: {f}") for f in FIELDS
    }
    return fields, dataclasses.replace(data, prompt_state_dim=said.prompt_state_dim)


def _robot(options: PolicyOptions) -> RobotDescription | None:
    """The description that --robot names, with the default prompt that was given."""
    if not options.robot:
        return None
    robot = find_robot(options.robot)
    if options.default_prompt:
        robot = dataclasses.replace(robot, default_prompt=options.default_prompt)
    return robot


def _without_state(data: DataConfig, *, fast: bool) -> DataConfig:
    """A π0.5's data with openpi's prompt of the instruction alone; limits and quantiles stay π0.5's."""
    if data.prompt != "pi05":
        holds = "always holds the state" if fast else "holds no state, a token of its own does"
        raise ValueError(f"--no-state-in-prompt is for a π0.5; this model's prompt {holds}")
    return dataclasses.replace(data, prompt="pi0", ignore_state=True)


def _check_dims(statistics: Statistics, model: VLAConfig, name: str) -> None:
    """Refuses statistics of more dims than the model has."""
    sizes = {
        "state": (statistics.state.dims, model.expert.state_dim, "state_dim"),
        "actions": (statistics.action.dims, model.expert.action_dim, "action_dim"),
    }
    for field, (found, most, option) in sizes.items():
        if found > most:
            raise ValueError(
                f"the statistics {name} have {found} dims of {field}, the model {most} (model.expert.{option}): "
                "choose others with --statistics"
            )


def _tokenizer(path: Path, model: VLAConfig) -> Tokenizer:
    """The given tokenizer, refused where it has more entries than the model's embedding."""
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > model.backbone.vocab:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} entries, the model's embedding {model.backbone.vocab}: it is "
            "not this model's tokenizer"
        )
    return tokenizer


def _transforms(
    model: VLAConfig,
    data: DataConfig,
    statistics: Statistics,
    schema: DatasetSchema,
    robot: RobotDescription | None,
    tokenizer: Tokenizer,
    as_tokens: TokenizeActions | None,
) -> tuple[tf.Transform, ...]:
    """From what the robot sends to the model's batch."""
    size = model.backbone.image_size
    same = {camera: (size, size) for camera in model.cameras}
    return (
        *(() if robot is None else (RobotUnits(robot),)),
        tf.SelectCameras(same) if robot is None else select_of(robot, model.cameras, schema, size),
        tf.ResizeImages(size, size, fit="openpi"),
        # Their formula has an epsilon of its own in place of our least scale.
        Normalize(method=data.normalization, group="dataset", statistics={"": statistics}, floor=False),
        *(() if as_tokens is None else (as_tokens,)),
        tf.Tokenize(tokenizer, data.max_text_tokens, data.max_target_tokens, data.prompt_form),
        tf.PadDims(
            state_dim=model.expert.state_dim,
            action_dim=model.expert.action_dim,
            robot_action_dim=statistics.action.dims,
        ),
    )


def _schema(
    model: VLAConfig,
    statistics: Statistics,
    options: PolicyOptions,
    robot: RobotDescription | None,
    name: str,
) -> DatasetSchema:
    """What is sent and returned: by the robot's names, or else by the model's."""
    size = model.backbone.image_size
    cameras = model.cameras if robot is None else [camera.name for camera in robot.cameras]
    labels = {
        "state": tuple(f"state_{i}" for i in range(statistics.state.dims)),
        "actions": tuple(f"action_{i}" for i in range(statistics.action.dims)),
    }
    if robot is not None:
        labels = {"state": robot.labels("state"), "actions": robot.labels("actions")}
    return DatasetSchema(
        name="converted",
        robot=name if robot is None else robot.name,
        cameras={camera: (size, size) for camera in cameras},
        state_names=labels["state"],
        action_names=labels["actions"],
        control_hz=options.control_hz or (robot.control_hz if robot else 0) or 20.0,
    )


def _of_dims(
    fields: Mapping[Field, tuple[np.ndarray, np.ndarray]],
    raw: Mapping[str, Any],
    model: VLAConfig,
    options: PolicyOptions,
    said: Mapping[str, int | None],
) -> dict[Field, tuple[np.ndarray, np.ndarray]]:
    """Offsets and scales of the dims that a robot without a description has."""
    given = {"state": options.state_dims, "actions": options.action_dims}
    most = {"state": model.expert.state_dim, "actions": model.expert.action_dim}
    cut: dict[Field, tuple[np.ndarray, np.ndarray]] = {}
    for field, (offset, scale) in fields.items():
        dims = robot_dims(
            field, raw[field], len(offset), given=given[field], said=said.get(field), model=most[field]
        )
        cut[field] = (offset[:dims], scale[:dims])
    return cut


def _of_robot(
    field: Field, pair: tuple[np.ndarray, np.ndarray], robot: RobotDescription, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of the robot's own dims: openpi often pads before it computes statistics, and cuts these too."""
    dims = len(robot.labels(field))
    if len(pair[0]) < dims:
        raise ValueError(
            f"the statistics {name} have {len(pair[0])} dims of {field}, robot {robot.name} has {dims}; choose the "
            "robot that they were computed for with --robot"
        )
    offset, scale = (np.array(values[:dims]) for values in pair)
    raw = list(robot.unscaled(field))
    offset[raw], scale[raw] = 0.0, 1.0
    return offset, scale


def _choose(assets: Mapping[str, Any], wanted: str) -> tuple[str, Mapping[str, Any]]:
    """Statistics of state and actions, as openpi names them."""
    found = dict(assets.get("norm_stats", {}))
    lerobot = assets.get(LEROBOT, {}).get("statistics", {})
    if {"observation.state", "action"} <= lerobot.keys():
        found[LEROBOT] = {"state": lerobot["observation.state"], "actions": lerobot["action"]}
    if not found:
        raise ValueError(
            "beside these weights lie no statistics of state and actions, so they are no policy yet"
        )
    if wanted and wanted not in found:
        raise ValueError(f"there are no statistics {wanted!r}; there are {', '.join(sorted(found))}")
    if not wanted and len(found) > 1:
        raise ValueError(f"there are statistics of {', '.join(sorted(found))}: choose one with --statistics")
    name = wanted or next(iter(found))
    return name, found[name]


def _openpi_affine(raw: Mapping[str, Any], method: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """offset and scale of openpi's formulas: the deviation, or the difference of quantiles, and epsilon."""
    needed = ("mean", "std") if method == "zscore" else ("q01", "q99")
    missing = [kind for kind in needed if raw.get(kind) is None]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}, which this model's normalisation takes")
    first, second = (np.asarray(raw[kind], np.float64) for kind in needed)
    second = second + EPSILON
    return (first, second) if method == "zscore" else ((first + second) / 2, (second - first) / 2)


def _statistics(offset: np.ndarray, scale: np.ndarray) -> FieldStatistics:
    """Statistics that normalise to (x - offset) / scale by either method."""
    low, high = tuple(offset - scale), tuple(offset + scale)
    return FieldStatistics(
        mean=tuple(offset), std=tuple(scale), min=low, max=high, q01=low, q99=high, count=0
    )
