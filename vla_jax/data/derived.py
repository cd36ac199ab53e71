"""What was computed from a data set is kept beside it, under a name made from what it was computed from."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_jax.data import rlds

DIRECTORY = "derived"


def key_hash(key: Mapping[str, Any]) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cached(dataset: Path, kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """`compute()` as JSON values, read from `dataset/derived/` if the same key was computed before.

    Where the directory cannot be written, that is said and the value is computed again next time.
    """
    key = json.loads(json.dumps(key))
    path = dataset / DIRECTORY / f"{kind}-{key_hash(key)}.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text())
        except json.JSONDecodeError:
            stored = {}
        if isinstance(stored, dict) and stored.get("key") == key:
            return stored["value"]
    value = compute()
    try:
        path.parent.mkdir(exist_ok=True)
        rlds.write_atomically(path, json.dumps({"key": key, "value": value}).encode())
    except OSError as error:
        logging.getLogger(__name__).warning("%s is not kept beside the data: %s", kind, error)
    return value
