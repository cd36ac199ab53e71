"""From a decoded message to requests whose every field has the right type and shape, or one line that says why not.

    {"observation/top": u8[h w 3], "observation/state": f32[q], "prompt": "…", "options": {"seed": 3}}
    {"batch": [{…}, {…}]}

Nested maps mean the same as their keys joined by "/". A camera may be None: the robot has none now (a masked image).
Nothing is ignored: an unknown key is an error that names the nearest known one. Where the policy's robot is described
(`data.robots`), its own entries stand in place of these.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vla_jax.data.fields import check_image, check_state, check_text, kind
from vla_jax.data.observations import check_names
from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.robots.message import read_message
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.spec import BATCH, OPTIONS, PROMPT, STATE, Spec, camera_key

MAX_TEXT = 2048
"""Characters of a prompt or plan; the tokenizer's own limit is lower and is checked later."""
MAX_SEED = 2**31
MAX_GUIDANCE = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One observation and what is wanted for it."""

    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    state: Float[np.ndarray, " q"]
    prompt: str
    seed: int | None = None
    """Seed of the noise; None: the server chooses one, and says which."""
    samples: int = 1
    plan: str | None = None
    """A text that the actions are to follow."""
    plan_visible: bool = False
    """Decode a plan and let the actions follow it."""
    write_plan: bool = False
    """Decode a plan and return it."""
    guidance: float | None = None
    """Weight of the instruction; None: that of the plain policy, 1."""
    deadline_ms: float | None = None
    """How long the answer may take; None: as long as the server allows."""


def parse(message: Any, spec: Spec, rename: Mapping[str, str]) -> tuple[list[Request], bool]:
    """The requests of a message, and whether it is a batch. Raises Refused.

    `rename` maps keys of the robot to the metadata's.
    """
    if not isinstance(message, dict):
        raise Refused("invalid", f"a request is a map, not {kind(message)}")
    if BATCH not in message:
        return [_request(message, spec, rename)], False
    rows = message[BATCH]
    if len(message) > 1 or not isinstance(rows, list) or not 1 <= len(rows) <= spec.max_rows:
        raise Refused("invalid", f"a batch is a list of 1 to {spec.max_rows} requests, alone in its message")
    requests = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Refused("invalid", f"batch[{number}] is a map, not {kind(row)}")
        try:
            requests.append(_request(row, spec, rename))
        except Refused as refusal:
            raise Refused(refusal.code, f"batch[{number}]: {refusal.message}") from None
    return requests, True


def _request(message: dict, spec: Spec, rename: Mapping[str, str]) -> Request:
    options = message.get(OPTIONS, {})
    observation = {key: value for key, value in message.items() if key != OPTIONS}
    fields = {}
    for key, value in _flat(observation, ""):
        key = rename.get(key, key)
        if key in fields:
            raise Refused("invalid", f"{key} is given twice")
        fields[key] = value
    if spec.robot is not None:
        fields = _described(fields, spec.robot, spec)
    if PROMPT not in fields and spec.default_prompt:
        fields[PROMPT] = spec.default_prompt
    expected = {camera_key(camera): camera for camera in spec.cameras} | {STATE: STATE, PROMPT: PROMPT}
    _only(fields, expected, "key")
    for key in expected:
        if key not in fields:
            hint = "; send it, or serve with --default-prompt TEXT" if key == PROMPT else ""
            raise Refused("invalid", f"{key} is missing; the observation has {', '.join(expected)}{hint}")
    images = {
        camera: _image(camera, fields[camera_key(camera)], spec)
        for camera in spec.cameras
        if fields[camera_key(camera)] is not None
    }
    if not images:
        raise Refused("invalid", "every camera is None; at least one image is needed")
    state = _field(check_state, STATE, fields[STATE], len(spec.state_names))
    return Request(
        images=images, state=state, prompt=_text(PROMPT, fields[PROMPT]), **_options(options, spec)
    )


def _described(fields: dict[str, Any], robot: RobotDescription, spec: Spec) -> dict[str, Any]:
    """The robot's own entries as ours."""
    message = _field(read_message, robot, fields)
    images = {camera_key(camera): message.images[camera] for camera in spec.cameras}
    prompt = {} if message.instruction is None else {PROMPT: message.instruction}
    return {**images, STATE: message.state, **prompt}


def _flat(value: dict, prefix: str) -> Iterable[tuple[str, Any]]:
    """Leaves of nested maps; the decoder has bounded depth and number."""
    for key, inner in value.items():
        if not isinstance(key, str):
            raise Refused("invalid", f"the key {key[:40]!r} is not a string")
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", inner


def _field(check: Callable[..., Any], *what: Any, **how: Any) -> Any:
    """A field by the policy's own rules (`data.fields`), refused in the server's words."""
    try:
        return check(*what, **how)
    except ValueError as error:
        raise Refused("invalid", str(error)) from None


def _image(camera: str, value: Any, spec: Spec) -> UInt8[np.ndarray, "h w 3"]:
    """One of any size that is taken."""
    size = None if spec.max_pixels else spec.cameras[camera]
    image = _field(check_image, spec.key_of(camera), value, size=size)
    if not spec.takes(image.shape[:2], camera):
        height, width = spec.cameras[camera]
        raise Refused(
            "invalid",
            f"{spec.key_of(camera)} is {kind(image)}; the image size is over {spec.max_pixels} pixels (metadata: "
            f"max_pixels): resize it, to {height} × {width} (height × width) as trained on or to less than that limit",
        )
    return image


def _text(key: str, value: Any) -> str:
    return _field(check_text, key, value, longest=MAX_TEXT, empty=False)


def _options(value: Any, spec: Spec) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("invalid", f"{OPTIONS} is {kind(value)}; a map is expected")
    _only(value, spec.options, "option")
    options = {}
    for key, given in value.items():
        given = given.item() if isinstance(given, np.generic) else given
        options[key] = _option(key, given, spec)
    if "plan" in options and (options.get("plan_visible") or options.get("write_plan")):
        raise Refused("invalid", "a plan is given, so none is written; leave out plan_visible and write_plan")
    return options


def _option(key: str, value: Any, spec: Spec) -> Any:
    if key == "plan":
        return _text("options.plan", value)
    valid = {
        "seed": (type(value) is int and 0 <= value < MAX_SEED, f"an integer from 0 to {MAX_SEED - 1}"),
        "samples": (
            type(value) is int and value in spec.samples,
            f"one of {', '.join(map(str, spec.samples))}",
        ),
        "deadline_ms": (type(value) in (int, float) and 0 < value < 1e9, "a number of milliseconds above 0"),
        "guidance": (
            type(value) in (int, float) and 0 <= value <= MAX_GUIDANCE,
            f"a number from 0 to {MAX_GUIDANCE:g}",
        ),
        "plan_visible": (type(value) is bool, "true or false"),
        "write_plan": (type(value) is bool, "true or false"),
    }
    fits, what = valid[key]
    if not fits:
        raise Refused("invalid", f"options.{key} is {str(value)[:40]!r}; {what} is expected")
    return value


def _only(given: Iterable[str | bytes], known: Iterable[str], what: str) -> None:
    _field(check_names, given, list(known), what)
