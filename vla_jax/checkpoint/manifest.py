"""``checksums.json``: what every file of a checkpoint must hold, but those of the arrays, which have sums of their own.

It is written into the folder before that gets its name, so no whole checkpoint lacks it but older ones. It counts for
itself too, and it says which step it is of, whatever the folder is called.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping

from vla_jax.checkpoint.paths import Path, write_atomically

NAME = "checksums.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one step's folder must hold."""

    step: int
    files: Mapping[str, str]
    """Path below the step's folder → SHA-256."""

    def check(self, step_dir: Path, part: str) -> None:
        """Raises ValueError where a file of a part (an item, or ``meta``) is missing or is not what was written."""
        names = [name for name in self.files if name.startswith(f"{part}/")]
        if not names:
            raise ValueError(f"{NAME} knows no '{part}'")
        for name in names:
            self.check_bytes(name, (step_dir / name).read_bytes())

    def check_bytes(self, name: str, data: bytes) -> None:
        """Raises ValueError where these are not the bytes of the file."""
        if self.files.get(name) != hashlib.sha256(data).hexdigest():
            raise ValueError(f"the checksum of {name} is wrong")


def write_manifest(step_dir: Path, step: int) -> None:
    """Notes what the files of a step hold now that all of them are written."""
    files = {
        "/".join(path.relative_to(step_dir).parts): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in sorted(child for child in step_dir.iterdir() if child.is_dir())
        for path in _files(folder)
    }
    body = {"step": step, "files": files}
    write_atomically(step_dir / NAME, json.dumps({"sha256": _hash(body), **body}, indent=1) + "\n")


def read_manifest(step_dir: Path) -> Manifest | None:
    """None where there is none: the checkpoint is older than they are. Raises ValueError where it is damaged."""
    path = step_dir / NAME
    if not path.exists():
        return None
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict) or found.pop("sha256", None) != _hash(found):
        raise ValueError(f"the checksum of {NAME} is wrong")
    return Manifest(found["step"], found["files"])


def _files(folder: Path) -> Iterator[Path]:
    """All files but those that hold arrays: OCDBT keeps these in folders ``d``."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir():
            yield child
        elif child.name != "d":
            yield from _files(child)


def _hash(body: Mapping) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
