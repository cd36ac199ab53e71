"""What a client can tell of a request before it is sent: the server's own rules, by the metadata that it gave.

Only what is certain is refused here. A server may know further keys (`--rename`), so a key that the metadata do not
describe is left to it, and so are the entries of a described robot, which take several forms. Needs numpy only, as
`data.fields` does: robots use this file too.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vla_jax.data.fields import check_image, check_state, check_text, kind
from vla_jax.serve.server.errors import Refused


def check_request(observation: Mapping[str, Any], metadata: Mapping[str, Any], where: str = "") -> None:
    """Raises Refused where a field that the metadata describe is not what they say; `where` leads the message."""
    described = {} if "described_robot" in metadata else metadata.get("observation", {})
    for key, value in _leaves(observation, ""):
        entry = described.get(key)
        if not isinstance(entry, Mapping) or value is None:
            continue
        shape, dtype = tuple(entry.get("shape", ())), entry.get("dtype")
        if dtype == "uint8" and len(shape) == 3 and shape[-1] == 3:
            _check_image(where + key, value, shape[:2], metadata.get("max_pixels", 0))
        elif dtype == "float32" and len(shape) == 1:
            _refuse(check_state, where + key, value, shape[0])
        elif dtype == "str":
            _refuse(check_text, where + key, value, empty=False)


def check_size(frame: bytes, message: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raises Refused where an encoded message is longer than the server reads: it would close the connection."""
    most = metadata.get("max_bytes", len(frame))
    if len(frame) <= most:
        return
    rows = message.get("batch", [message])
    arrays = [
        (value.nbytes, key, value)
        for row in rows
        for key, value in _leaves(row, "")
        if isinstance(value, np.ndarray)
    ]
    largest = ""
    if arrays:
        _, key, value = max(arrays, key=lambda entry: entry[0])
        largest = f" ({key} is {kind(value)})"
    remedy = "check the image size and the size of the other arrays"
    if len(rows) > 1:
        remedy = "send fewer rows in a message, or smaller images"
    raise Refused(
        "invalid",
        f"the message has {len(frame)} bytes{largest}, the server reads {most} (metadata: max_bytes); {remedy}",
    )


def _check_image(key: str, value: Any, size: tuple[int, int], max_pixels: int) -> None:
    image = _refuse(check_image, key, value, size=None if max_pixels else size)
    height, width = image.shape[:2]
    if (height, width) != size and height * width > max_pixels:
        raise Refused(
            "invalid",
            f"{key} is {kind(value)}; the image size is over {max_pixels} pixels (metadata: max_pixels): resize it, to "
            f"{size[0]} × {size[1]} (height × width) as trained on or to less than that limit",
        )


def _refuse(check: Callable[..., Any], *what: Any, **how: Any) -> Any:
    try:
        return check(*what, **how)
    except ValueError as error:
        raise Refused("invalid", str(error)) from None


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested maps mean the same as their keys joined by "/"."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", inner
