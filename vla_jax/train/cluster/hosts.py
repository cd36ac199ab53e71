"""Which code a process runs, and what it makes of the data."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import vla_jax
from vla_jax.checkpoint.manager import flatten, versions
from vla_jax.data.bundle import DataBundle


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A fingerprint, and what it is made of."""

    short: str
    parts: Mapping[str, str]


def code_hash() -> Fingerprint:
    """The fingerprint of this package's sources and of the libraries that decide what they compute.

    Without commands and experiments, whose result is the configuration: that is compared by itself.
    """
    root = Path(vla_jax.__file__).parent
    parts = {
        str(path.relative_to(root.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] not in ("cli", "configs")
    }
    parts |= versions()
    return _whole(parts)


def bundle_hash(bundle: DataBundle) -> Fingerprint:
    """The fingerprint of schema, tokenizer, statistics and transforms, whatever files they were read from."""
    values = bundle.to_json()
    named = {f"{i} {one['type']}": one for i, one in enumerate(values["transforms"])}
    fields = flatten({"schema": values["schema"]} | named)
    return _whole({name: _short(json.dumps(value)) for name, value in fields.items()})


def _whole(parts: Mapping[str, str]) -> Fingerprint:
    return Fingerprint(_short(repr(sorted(parts.items()))), parts)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
