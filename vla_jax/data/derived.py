"""What was computed from a data set is kept beside it, under a name made from what it was computed from."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_jax.data.sources import rlds

DIRECTORY = "derived"


def key_hash(key: Mapping[str, Any]) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(stored: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def cached(dataset: Path, kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """`compute()` as JSON values, read from `dataset/derived/` if the same key was computed before.

    What is there must have the right checksum, else it is computed anew. Where the directory cannot be written,
    that is said and the value is computed again next time.
    """
    key = json.loads(json.dumps(key))
    path = dataset / DIRECTORY / f"{kind}-{key_hash(key)}.json"
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError:
            stored = None
        if isinstance(stored, dict) and stored.pop("sha256", None) == _sha256(stored):
            return stored["value"]
        logging.getLogger(__name__).warning("%s is damaged or has no checksum: it is computed anew", path)
    value = json.loads(json.dumps(compute()))
    try:
        path.parent.mkdir(exist_ok=True)
        stored = {"key": key, "value": value}
        rlds.write_atomically(path, json.dumps({"sha256": _sha256(stored), **stored}).encode())
    except OSError as error:
        logging.getLogger(__name__).warning("%s is not kept beside the data: %s", kind, error)
    return value
