"""Paths of runs: a local directory, or ``gs://bucket/folder``."""

import os
import pathlib

from etils import epath

Path = epath.Path
"""Behaves like `pathlib.Path`, wherever it is."""


def run_path(path: str | os.PathLike) -> Path:
    """An absolute path; ``gs://…`` needs the gcs extra."""
    text = os.fspath(path)
    if is_remote(text):
        return epath.Path(text)
    return epath.Path(pathlib.Path(text).absolute())


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on an object store, where files cannot be appended to, locked or renamed at once."""
    return "://" in os.fspath(path)


def write_atomically(path: Path | pathlib.Path, text: str) -> None:
    """A reader sees the old text or the new one, never a part of it."""
    if is_remote(path):
        path.write_text(text)  # an object appears once it is whole
        return
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text)
    draft.replace(path)
