"""Our side: weights in a run's directory, read and written one piece at a time, with the checkpoints' checksums.

RUN_DIR/checkpoints/<step>/{params, ema}   what `vla_jax.checkpoint` saves
RUN_DIR/checkpoints/<step>/originals       after an import: the arrays whose `time_flip` rounded, as they came
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from vla_jax.checkpoint import read_meta
from vla_jax.checkpoint.manager import versions
from vla_jax.checkpoint.read import FOLDER, whole_steps
from vla_jax.config import TrainConfig, from_json, to_json
from vla_jax.convert.account import account
from vla_jax.convert.entry import Index, Lazy
from vla_jax.convert.model import our_shapes
from vla_jax.convert.sources import OrbaxSource
from vla_jax.convert.stream import Whole, write_orbax
from vla_jax.convert.time_flip import Flip
from vla_jax.models.config import VLAConfig

ORIGINALS = "originals"


class WordSums:
    """`vla_jax.checkpoint.fingerprint` of a tree whose arrays pass by in pieces, each piece once."""

    def __init__(self, names: Mapping[str, Any]):
        self._sums = dict.fromkeys(names, 0)

    def add(self, name: str, piece: np.ndarray) -> None:
        """Counts a piece of an array."""
        words = np.ascontiguousarray(piece).view({2: np.uint16, 4: np.uint32}[piece.dtype.itemsize])
        self._sums[name] += int(words.sum(dtype=np.uint64))

    def total(self) -> int:
        """The checksum of all arrays, in the order in which JAX flattens the tree."""
        total = 0
        for name in sorted(self._sums, key=lambda name: name.split("/")):
            total = (total * 31 + self._sums[name]) % 2**32
        return total


class RunSource:
    """The weights of a run, averaged ones where it has them. Raises FileNotFoundError or ValueError."""

    def __init__(self, path: Path, weights: str | None):
        self.path = path
        self.meta = read_meta(path)
        has = self.meta["items"]
        item = weights or ("ema" if "ema" in has else "params")
        if item not in has:
            raise ValueError(f"{path} has no '{item}'; it has {', '.join(has)}")
        step = self._step_dir()
        self._arrays = OrbaxSource(step / item)
        self.specs = self._arrays.specs
        self.model: VLAConfig = from_json(json.dumps(self.meta["config"])).model
        self.expert = any(name.startswith("expert/") for name in self.specs)
        account(f"{path} ({item})", self.specs, our_shapes(self.model, expert=self.expert))
        self._wanted = self.meta["fingerprints"][item]
        self._sums = WordSums(self.specs)
        self._originals = OrbaxSource(step / ORIGINALS) if ORIGINALS in has else None

    @property
    def assets(self) -> dict[str, Any]:
        """What came with imported weights."""
        return self.meta.get("assets", {})

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The part of an array; for the checksum, each part is to be read once."""
        piece = self._arrays.read(name, index)
        self._sums.add(name, piece)
        return piece

    def originals(self, flips: Mapping[str, Flip]) -> dict[str, np.ndarray]:
        """Arrays as they were imported, of those whose flipped form has not been changed since."""
        if self._originals is None:
            return {}
        kept = {}
        for name in self._originals.specs:
            original, now = self._originals.read(name), self._arrays.read(name)
            if np.array_equal(flips[name](original).astype(now.dtype), now):
                kept[name] = original
        return kept

    def verify(self) -> None:
        """Raises ValueError unless what has been read is what was saved; after everything was read once."""
        if self._sums.total() != self._wanted:
            raise ValueError(f"{self.path} is damaged: the checksum of its weights is wrong")

    def _step_dir(self) -> Path:
        path = self.path.absolute()
        for folder in (path / FOLDER, path):
            if folder.is_dir() and not path.name.isdigit() and (steps := whole_steps(folder)):
                return folder / str(max(step for step in steps if step == self.meta["step"]))
        return path


def write_run(
    path: Path,
    arrays: Mapping[str, Lazy],
    originals: Mapping[str, np.ndarray],
    model: VLAConfig,
    record: Mapping[str, Any],
) -> None:
    """A run's directory with one checkpoint, step 0; `record` is further metadata."""
    items: dict[str, Mapping[str, Lazy]] = {"params": arrays}
    if originals:
        items[ORIGINALS] = {name: _whole(array) for name, array in originals.items()}
    config = json.loads(to_json(TrainConfig(model=model)))
    with Whole(path) as partial:
        step = partial / FOLDER / "0"
        step.mkdir(parents=True)
        fingerprints = {}
        for item, tree in items.items():
            sums = WordSums(tree)
            write_orbax(step / item, {name: _summed(name, lazy, sums) for name, lazy in tree.items()})
            fingerprints[item] = sums.total()
        meta = dict(
            record,
            step=0,
            config=config,
            items=sorted(items),
            fingerprints=fingerprints,
            versions=versions(),
        )
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save((step / "meta").absolute(), args=ocp.args.JsonSave(meta))


def _summed(name: str, lazy: Lazy, sums: WordSums) -> Lazy:
    def pieces() -> Iterator[tuple[Index, np.ndarray]]:
        for index, piece in lazy.pieces():
            sums.add(name, piece)
            yield index, piece

    return Lazy(lazy.shape, lazy.dtype, pieces)


def _whole(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: iter([((), array)]))
