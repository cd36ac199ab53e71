"""What LeRobot's saved preprocessor (policy_preprocessor.json) does to states, actions and prompts.

| norm_map     | normalised                                                  |
|--------------|-------------------------------------------------------------|
| `MEAN_STD`   | (x - mean) / (std + eps)                                    |
| `MIN_MAX`    | 2 (x - min) / (max - min) - 1, with eps for a difference of 0 |
| `QUANTILES`  | the same of q01 and q99                                     |
| `QUANTILE10` | the same of q10 and q90                                     |
| `IDENTITY`   | x                                                           |

After LeRobot's processor/normalize_processor.py. Its way back takes std without eps: of 1e-8, no float32 shows that.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

EPSILON = 1e-8
"""LeRobot's own, where a file does not say it."""
LIMITS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
"""Modes whose two statistics become -1 and 1."""
MODES = ("IDENTITY", "MEAN_STD", *LIMITS)
TYPES = {"state": "STATE", "actions": "ACTION"}
STATE = "observation.state"

NORMALIZER = "normalizer_processor"
STATE_IN_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
RELATIVE = "relative_actions_processor"
HARMLESS = (
    "rename_observations_processor",
    "to_batch_processor",
    "tokenizer_processor",
    "device_processor",
    "pi0_new_line_processor",
    "newline_task_processor",
)
"""Steps that a policy here does in its own way, or that have no counterpart to do."""


class Preprocessing(NamedTuple):
    """What the steps say."""

    modes: dict[str, str]
    """Of `state` and `actions`."""
    eps: float
    prompt_state_dim: int
    """Dimensions that the state is filled up to with zeros before the prompt names its bins; 0: as it has."""


def read_preprocessing(asset: Mapping[str, Any]) -> Preprocessing:
    """The steps beside a policy's weights. Raises ValueError where one is not known or can't be done here."""
    policy = asset["config"]
    steps = asset.get("preprocessor", {}).get("steps", [])
    found = {step.get("registry_name", step.get("class")): step.get("config") or {} for step in steps}
    relative = found.pop(RELATIVE, {"enabled": False})
    if relative.get("enabled", True):
        raise ValueError(
            f"the preprocessor's {RELATIVE} makes actions relative to the state, which policies here do not do"
        )
    unknown = [name for name in found if name not in (NORMALIZER, STATE_IN_PROMPT, *HARMLESS)]
    if unknown:
        raise ValueError(f"the preprocessor has a step that is not known here: {unknown[0]}")
    step = found.get(NORMALIZER, {})
    norm_map = step.get("norm_map") or policy.get("normalization_mapping")
    if not norm_map:
        raise ValueError(
            f"neither the preprocessor's {NORMALIZER} (norm_map) nor config.json (normalization_mapping) says how "
            "states and actions are normalised"
        )
    if norm_map.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise ValueError(
            f"the preprocessor normalises images by {norm_map['VISUAL']}; the image encoder here takes them as they are"
        )
    modes = {field: norm_map.get(kind, "IDENTITY") for field, kind in TYPES.items()}
    for field, mode in modes.items():
        if mode not in MODES:
            raise ValueError(
                f"the preprocessor normalises {field} by {mode}; there are {', '.join(MODES)} here"
            )
    if STATE not in (step.get("normalize_observation_keys") or (STATE,)):
        modes["state"] = "IDENTITY"
    padded = 0
    if STATE_IN_PROMPT in found:
        padded = found[STATE_IN_PROMPT].get("max_state_dim", policy.get("max_state_dim", 32))
    return Preprocessing(modes, step.get("eps", EPSILON), padded)


def affine(
    raw: Mapping[str, Any], mode: str, eps: float, where: str
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """offset and scale of (x - offset) / scale. Raises ValueError where a statistic is missing."""
    if mode == "IDENTITY":
        dims = max(np.size(values) for values in raw.values())  # a count of samples is among them
        return np.zeros(dims), np.ones(dims)
    needed = ("mean", "std") if mode == "MEAN_STD" else LIMITS[mode]
    missing = [kind for kind in needed if raw.get(kind) is None]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}, which {mode} takes")
    first, second = (np.asarray(raw[kind], np.float64) for kind in needed)
    if mode == "MEAN_STD":
        return first, second + eps
    span = np.where(second == first, eps, second - first)
    return first + span / 2, span / 2
