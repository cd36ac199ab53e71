"""Which code a process runs."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import vla_jax
from vla_jax.checkpoint.manager import versions


@dataclasses.dataclass(frozen=True)
class CodeHash:
    """A fingerprint, and what it is made of."""

    short: str
    parts: Mapping[str, str]


def code_hash() -> CodeHash:
    """The fingerprint of this package's sources and of the libraries that decide what they compute."""
    root = Path(vla_jax.__file__).parent
    parts = {
        str(path.relative_to(root.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(root.rglob("*.py"))
    }
    parts |= versions()
    whole = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
    return CodeHash(whole[:12], parts)
