"""Our side: weights in a run's directory, read and written one piece at a time, with the checkpoints' checksums.

RUN_DIR/checkpoints/<step>/{params, ema, frozen}   what `vla_jax.checkpoint` saves
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vla_jax.checkpoint import Saved, open_newest
from vla_jax.checkpoint.failures import attempt
from vla_jax.checkpoint.fingerprint import describe, piece_sum
from vla_jax.checkpoint.manager import versions
from vla_jax.checkpoint.manifest import write_manifest
from vla_jax.checkpoint.paths import run_path
from vla_jax.checkpoint.plain_sum import fold
from vla_jax.checkpoint.steps import FOLDER, is_whole
from vla_jax.config import TrainConfig, from_meta, to_json
from vla_jax.convert.account import account
from vla_jax.convert.entry import ArraySpec, Index, Lazy
from vla_jax.convert.model import our_shapes
from vla_jax.convert.sources import OrbaxSource
from vla_jax.convert.statistics import run_statistics
from vla_jax.convert.stream import Whole, write_orbax
from vla_jax.layers import lora
from vla_jax.layers.matrices import matrix_axes
from vla_jax.models.config import VLAConfig


class PieceSums:
    """`vla_jax.checkpoint.fingerprint` of a tree whose arrays pass by in pieces, each piece once."""

    def __init__(self, specs: Mapping[str, ArraySpec | Lazy]):
        self._specs = specs
        self._sums = dict.fromkeys(specs, 0)
        self._plain = dict.fromkeys(specs, 0)

    def add(self, name: str, index: Index, piece: np.ndarray) -> None:
        """Counts the piece of an array that lies at `index`."""
        self._sums[name] += piece_sum(self._specs[name].shape, index, piece)

    def add_plain(self, name: str, piece: np.ndarray) -> None:
        """Counts the same for a checkpoint that has `plain_sum`s."""
        words = np.ascontiguousarray(piece).view({2: np.uint16, 4: np.uint32}[piece.dtype.itemsize])
        self._plain[name] += int(words.sum(dtype=np.uint64))

    def of_all(self) -> dict[str, str]:
        """The checksums, as a checkpoint's metadata have them."""
        return {name: describe(spec, self._sums[name]) for name, spec in self._specs.items()}

    def plain(self) -> int:
        """The one sum of all arrays, in the order in which JAX flattens the tree."""
        return fold([self._plain[name] for name in sorted(self._plain, key=lambda name: name.split("/"))])


class RunSource:
    """The weights of a run, averaged ones where it has them, LoRA merged. Raises FileNotFoundError or ValueError."""

    def __init__(self, path: Path, weights: str | None):
        self.path = path
        self._saved, item, self._parts, self.config = open_newest(path, lambda saved: _open(saved, weights))
        self.meta = self._saved.meta
        self._part_of = {name: part for part, source in self._parts.items() for name in source.specs}
        saved = {name: spec for source in self._parts.values() for name, spec in source.specs.items()}
        self.specs = {
            # a sum with LoRA's A·B is float32, whatever the matrix was kept as: bfloat16 would round A·B away
            name: dataclasses.replace(spec, dtype=np.dtype(np.float32)) if _a(name) in saved else spec
            for name, spec in saved.items()
            if not lora.is_factor(name)
        }
        self.model: VLAConfig = self.config.model
        self._scale = self.config.lora.scale
        self._factors: tuple[str, dict[str, np.ndarray]] = ("", {})  # of the matrix that is being read
        self._summed: set[str] = set()  # factors that the checksum has counted; a matrix may be come back to
        self.expert = any(name.startswith("expert/") for name in self.specs)
        account(f"{path} ({item})", self.specs, our_shapes(self.model, expert=self.expert))
        self._sums = {part: PieceSums(source.specs) for part, source in self._parts.items()}

    @property
    def assets(self) -> dict[str, Any]:
        """What came with imported weights; the statistics of state and actions else are the run's own."""
        came = self.meta.get("assets", {})
        if "norm_stats" in came or "data" not in self.meta:
            return came
        return {**came, "norm_stats": run_statistics(self.meta["data"], self.model)}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The part of an array; for the checksum, each part is to be read once."""
        piece = self._read(name, index)
        if _a(name) not in self._part_of:
            return piece
        if self._factors[0] != name:
            self._factors = (name, {f: self._factor(f"{name}{lora.SUFFIX}/{f}") for f in ("a", "b")})
        a, b = (self._factors[1][f] for f in ("a", "b"))
        update = self._scale * _part_of_product(name, a, b, len(self.specs[name].shape), index)
        return piece.astype(np.float32) + update

    def _factor(self, name: str) -> np.ndarray:
        if name in self._summed:
            return self._parts[self._part_of[name]].read(name)
        self._summed.add(name)
        return self._read(name, ())

    def _read(self, name: str, index: Index) -> np.ndarray:
        part = self._part_of[name]
        try:
            piece = self._parts[part].read(name, index)
        except ValueError as error:
            if is_whole(self._saved.folder):
                raise
            raise ValueError(
                f"{self._saved.folder} was deleted while it was read: whoever trains keeps only the newest steps; "
                "run the same command again"
            ) from error
        if self._plain(part):
            self._sums[part].add_plain(name, piece)
        else:
            self._sums[part].add(name, index, piece)
        return piece

    def _plain(self, part: str) -> bool:
        return not isinstance(self.meta["fingerprints"][part], Mapping)

    def verify(self) -> None:
        """Raises ValueError unless what has been read is what was saved; after everything was read once."""
        for part, sums in self._sums.items():
            found = sums.plain() if self._plain(part) else sums.of_all()
            if found != self.meta["fingerprints"][part]:
                raise ValueError(
                    f"{self._saved.folder} is damaged: the checksum of its weights ({part}) is wrong; if the run has "
                    "an older step, give that"
                )


def _open(saved: Saved, weights: str | None) -> tuple[Saved, str, dict[str, OrbaxSource], TrainConfig]:
    """A step with its averaged or raw weights, and what it says of them."""
    has = saved.meta["items"]
    item = weights or ("ema" if "ema" in has else "params")
    saved.has(item)
    config = saved.built("configuration", lambda: from_meta(saved.meta))
    names = [name for name in (item, "frozen") if name in has]
    for name in names:
        saved.check(name)
    parts = {
        name: attempt(saved.folder, lambda name=name: OrbaxSource(Path(saved.folder / name)))
        for name in names
    }
    return saved, item, parts, config


def _a(name: str) -> str:
    """The path of a matrix's A."""
    return f"{name}{lora.SUFFIX}/a"


def _part_of_product(name: str, a: np.ndarray, b: np.ndarray, axes: int, index: Index) -> np.ndarray:
    """A·B[index] without more of A·B than the layers that the index asks for."""
    matrix = matrix_axes(name)
    assert matrix is not None  # it has a low-rank part, so it is one
    batch = axes - len(matrix.into) - len(matrix.outof)
    layers, rest = index[:batch], index[batch:]
    product = np.asarray(lora.product(name, jnp.asarray(a[layers]), jnp.asarray(b[layers])))
    kept = batch - sum(isinstance(i, int) for i in layers)
    return product[(slice(None),) * kept + rest]


def write_run(
    path: Path,
    arrays: Mapping[str, Lazy],
    config: TrainConfig,
    record: Mapping[str, Any],
    verify: Callable[[], None] = lambda: None,
) -> None:
    """A run's directory with one checkpoint, step 0; `record` is further metadata, `verify` the last word."""
    with Whole(path) as partial:
        step = partial / FOLDER / "0"
        step.mkdir(parents=True)
        sums = PieceSums(arrays)
        write_orbax(step / "params", {name: _summed(name, lazy, sums) for name, lazy in arrays.items()})
        verify()
        meta = dict(
            record,
            step=0,
            config=json.loads(to_json(config)),
            items=["params"],
            fingerprints={"params": sums.of_all()},
            versions=versions(),
        )
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save((step / "meta").absolute(), args=ocp.args.JsonSave(meta))
        write_manifest(run_path(step), 0)


def _summed(name: str, lazy: Lazy, sums: PieceSums) -> Lazy:
    def pieces() -> Iterator[tuple[Index, np.ndarray]]:
        for index, piece in lazy.pieces():
            sums.add(name, index, piece)
            yield index, piece

    return Lazy(lazy.shape, lazy.dtype, pieces)
