"""A data set with a robot's description: what is checked, and the statistics of what the model will see."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from vla_jax.data import transforms as tf
from vla_jax.data.config import DataConfig
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.robots.table import find_robot
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.source import EpisodeSource
from vla_jax.data.statistics import DatasetStatistics, dataset_statistics


def units_of(config: DataConfig, schema: DatasetSchema) -> RobotUnits | None:
    """What `data.robot` does to states and actions. Raises ValueError where the data set is not that robot's."""
    if not config.robot:
        return None
    robot = find_robot(config.robot)
    robot.check_dims(len(schema.state_names), len(schema.action_names), str(config.path))
    if robot.control_hz and robot.control_hz != schema.control_hz:
        raise ValueError(
            f"robot {robot.name}: control_hz is {robot.control_hz:g}, {config.path} was recorded at "
            f"{schema.control_hz:g}; describe it in a .json file with base and control_hz"
        )
    return RobotUnits(robot)


def select_of(
    robot: RobotDescription, model_cameras: tuple[str, ...], schema: DatasetSchema, image_size: int
) -> tf.SelectCameras:
    """Which camera of the robot is which of the model's; `model_cameras` empty: all that the robot names.

    Raises ValueError where a camera has no counterpart.
    """
    for camera in robot.cameras:
        if camera.required and camera.name not in schema.cameras:
            raise ValueError(
                f"robot {robot.name}: camera {camera.name!r} is not in the data, which have "
                f"{', '.join(schema.cameras)}; a camera that may be missing has required=false"
            )
    wanted = model_cameras or robot.model_cameras
    for name in wanted:
        if name not in robot.model_cameras:
            raise ValueError(
                f"robot {robot.name}: the model's camera {name!r} is neither filled nor absent; the robot names "
                f"{', '.join(robot.model_cameras)}"
            )
    for name, of in robot.fills.items():
        if name not in wanted:
            raise ValueError(
                f"robot {robot.name}: camera {of!r} fills {name!r}, the model has {', '.join(wanted)}"
            )
    sizes = {name: schema.cameras.get(robot.fills.get(name, ""), (image_size, image_size)) for name in wanted}
    black = tuple(name for name in wanted if name in robot.absent) if robot.absent_as == "black" else ()
    return tf.SelectCameras(sizes, fills=robot.fills, black=black)


def unscaled_of(robot: RobotDescription) -> dict[str, tuple[int, ...]]:
    """Field → dimensions that are not normalised, as `Normalize.unscaled` takes them."""
    found = {"state": robot.unscaled("state"), "action": robot.unscaled("actions")}
    return {field: dims for field, dims in found.items() if dims}


def robot_statistics(
    source: EpisodeSource,
    episodes: np.ndarray,
    fingerprint: str,
    units: RobotUnits | None,
    horizon: int,
    after_end: Literal["mask", "repeat"],
) -> DatasetStatistics:
    """Statistics in the model's units. Relative actions are those of all chunks, as the model will see them: the
    further ahead a step is, the further the robot has moved."""
    if units is None:
        return dataset_statistics(source, episodes, fingerprint)
    if units.relative and horizon < 1:
        raise ValueError(
            f"robot {units.robot.name} has relative actions, whose statistics depend on the chunk's length; give it"
        )
    repeat = after_end == "repeat"

    def rows(episode: EncodedEpisode) -> dict[str, Float[np.ndarray, "n dims"]]:
        state, action = episode.state, episode.action
        if not units.relative:
            # A chunk of one action for each step; the state is not read.
            return {"state": units.state(state), "action": units.actions(action[:, None], state)[:, 0]}
        wanted = np.arange(len(action))[:, None] + np.arange(horizon)
        chunks = units.actions(action[np.minimum(wanted, len(action) - 1)], state)
        return {"state": units.state(state), "action": chunks[(wanted < len(action)) | repeat]}

    key: dict[str, Any] = {"robot": units.robot.to_json()}
    if units.relative:
        key |= {"horizon": horizon, "repeat": repeat}
    return dataset_statistics(source, episodes, fingerprint, rows_of=rows, rows_key=key)
