"""What a format offers to `convert`: weights opened for reading, and a writer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.convert.account import account
from vla_jax.convert.entry import ArraySource, Entry, row_slices
from vla_jax.convert.model import our_shapes
from vla_jax.convert.policy_data import PolicyOptions
from vla_jax.finite import finite
from vla_jax.models.config import VLAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class Options:
    """What files do not say, and what a writer may choose."""

    cameras: tuple[str, ...] = ()
    """Names of the cameras, in the order of their tokens; empty: the format's usual ones."""
    horizon: int | None = None
    """Actions of a chunk, where no file beside the weights says it; None: 50."""
    names: str = "legacy"
    """Which generation of names `paligemma_hf` writes: legacy, 4.5x or 5.x."""
    max_file_bytes: int = 5 * 10**9
    """Largest safetensors file; more are listed in an index."""
    value: bool = True
    """Whether openpi's leaves end in /value, as openpi itself saves them."""
    lora_scale: float | None = None
    """α / rank of LoRA in openpi's attention layers, which no file says; None: 1, as in openpi's own variants."""
    policy: PolicyOptions | None = None
    """What makes imported weights a policy; None: they are weights, to start training from."""

    def chunk(self, said: int | None = None, file: Path | None = None) -> int:
        """Actions of a chunk; `said` is what a file says. Raises ValueError where `horizon` is another number."""
        if said is not None and self.horizon not in (None, said):
            raise ValueError(
                f"{file} says chunk_size={said}, so --horizon {self.horizon} would do nothing; leave it out"
            )
        return said or self.horizon or 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """Their weights, with the table that makes them ours. Nothing has been read but names and shapes."""

    where: Path
    source: ArraySource
    entries: list[Entry]
    model: VLAConfig
    expert: bool
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Second copies of tied weights, by the name of the first; they must be equal, and are left out."""
    unused: frozenset[str] = frozenset()
    """Arrays that no computation of theirs reads; left out."""
    assets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What lay beside the weights and goes into the run's metadata."""
    merged: tuple[str, ...] = ()
    """Matrices of theirs that LoRA is merged into."""

    def check(self) -> None:
        """Raises ValueError unless names, shapes and copies are right."""
        shapes = our_shapes(self.model, expert=self.expert)
        covered = {entry.ours for entry in self.entries}
        if covered != set(shapes):
            raise AssertionError(f"the table does not cover {sorted(covered ^ set(shapes))[:3]}")
        expected = {entry.theirs: entry.theirs_shape(shapes[entry.ours]) for entry in self.entries}
        account(self.where, self.source.specs, expected, unused=self.unused | set(self.copies))

    def check_copies(self) -> None:
        """Raises ValueError where a copy of a tied weight is another array. Reads both."""
        for copy, first in self.copies.items():
            spec = self.source.specs[copy]
            same = spec.shape == self.source.specs[first].shape and all(
                np.array_equal(self.source.read(copy, rows), self.source.read(first, rows))
                for rows in row_slices(spec.shape, spec.dtype.itemsize)
            )
            if not same:
                raise ValueError(f"{self.where}: {copy} is tied to {first}, but differs from it")
