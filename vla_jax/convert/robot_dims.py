"""How many dims of some statistics are the robot's: files that were padded before normalising have more.

openpi's statistics are often as long as the model; the robot's own dims then come first, and zeros that were filled up
behind them have neither mean nor spread. No file of openpi's says where they begin, and a dimension of a robot
that never moved looks the same, so that who converts is asked. LeRobot's files say the features' shapes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

STILL = 1e-6
"""Spread of what never moves: openpi's quantiles of a constant lie 1e-10 beside it, rounding adds to its deviation."""
FEATURES = {"state": "observation.state", "actions": "action"}
"""LeRobot's names."""
OPTIONS = {"state": "--state-dims", "actions": "--action-dims"}


def robot_dims(
    field: str, raw: Mapping[str, Any], found: int, *, given: int | None, said: int | None, model: int
) -> int:
    """The robot's dims of `field` (state or actions), the first ones of the `found` that the statistics `raw` have.

    `given` is the option, `said` what a file says, `model` the dims of the model. Raises ValueError, one line, where
    more are given than there are, and where nobody says it and the statistics look padded: as long as the model's, or
    with trailing dims that never move.
    """
    if given is not None:
        if given > found:
            raise ValueError(f"{OPTIONS[field]} {given}: the statistics have {found} dims of {field}")
        return given
    if said is not None and said < model:  # else it may itself be what was filled up
        return min(said, found)
    moving = np.flatnonzero(_spread(raw, found) > STILL)
    last = int(moving[-1]) + 1 if len(moving) else 0
    reasons = []
    if last < found:
        reasons.append(f"the last {found - last} of them never move")
    if found == model:
        reasons.append("the model has as many")
    if reasons:
        raise ValueError(
            f"the statistics have {found} dims of {field}, but {' and '.join(reasons)}, as where they were padded: say "
            f"how many the robot has with {OPTIONS[field]} (all: {OPTIONS[field]} {found}), or name it with --robot"
        )
    return found


def lerobot_dims(asset: Mapping[str, Any]) -> dict[str, int | None]:
    """Dims of state and actions that LeRobot's files say: the normaliser's features, else the policy's."""
    policy = asset["config"]
    features = {**(policy.get("input_features") or {}), **(policy.get("output_features") or {})}
    for step in asset.get("preprocessor", {}).get("steps", []):
        features |= (step.get("config") or {}).get("features") or {}
    return {field: _length(features.get(name)) for field, name in FEATURES.items()}


def _length(feature: Any) -> int | None:
    shape = feature.get("shape") if isinstance(feature, Mapping) else None
    return shape[0] if isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int) else None


def _spread(raw: Mapping[str, Any], dims: int) -> np.ndarray:
    """How far each dim moves. A gripper that rarely does may have equal quantiles: its deviation tells."""
    if raw.get("std") is not None:
        return np.abs(np.asarray(raw["std"], np.float64))
    for low, high in (("q01", "q99"), ("min", "max"), ("q10", "q90")):
        if raw.get(low) is not None and raw.get(high) is not None:
            return np.abs(np.asarray(raw[high], np.float64) - np.asarray(raw[low], np.float64))
    return np.full(dims, np.inf)  # nothing that tells
