"""Which cells are trained by one program: those that differ in nothing but numbers that a step can take as arrays."""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from vla_jax.config import TrainConfig, config_hash
from vla_jax.lab.grid import Cell, replaced
from vla_jax.objectives.terms import names_of
from vla_jax.train.knobs import Knobs


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells of one program."""

    cells: tuple[Cell, ...]

    @property
    def config(self) -> TrainConfig:
        """The configuration that the program is made from: the first cell's."""
        return self.cells[0].config

    @cached_property
    def id(self) -> str:
        """A short fingerprint of all its cells' configurations."""
        hashes = " ".join(config_hash(cell.config) for cell in self.cells)
        return hashlib.sha256(hashes.encode()).hexdigest()[:12]

    def knobs(self, copies: int = 0) -> Knobs:
        """The cells' own numbers, [cells]; the last one is repeated `copies` times."""
        configs = [cell.config for cell in self.cells] + [self.cells[-1].config] * copies
        rate = self.config.optim.learning_rate
        numbers: dict[str, Any] = dict(  # on the host: they go to the devices with the step
            seed=np.array([c.seed for c in configs], np.uint32),
            weights={
                name: np.array([c.objective.weight(name) for c in configs], np.float32)
                for name in names_of(self.config.objective)
            },
            insulation=np.array([c.objective.insulation for c in configs], np.float32),
            learning_rate=np.array([c.optim.learning_rate / rate for c in configs], np.float32),
        )
        return Knobs(**numbers)


def plan(cells: Sequence[Cell]) -> list[Group]:
    """Groups as large as they can be, in the order of their first cells.

    λ = 0 leaves a loss out of the program, because 0 · loss would still propagate its NaN: cells that leave out the
    same losses are groups of their own.
    """
    programs: dict[TrainConfig, list[Cell]] = {}
    for cell in cells:
        objective = cell.config.objective
        canonical = {"seed": 0, "objective.action_weight": float(objective.action_weight > 0)}
        canonical |= {"objective.weights": tuple((n, 1.0) for n, weight in objective.weights if weight > 0)}
        canonical |= {"objective.insulation": 1.0, "optim.learning_rate": 1.0}
        programs.setdefault(replaced(cell.config, canonical), []).append(cell)
    return [Group(tuple(members)) for members in programs.values()]


def split(group: Group, most: int) -> list[Group]:
    """The group in as few parts of at most `most` cells as possible, nearly equal ones."""
    if most < 1:
        raise ValueError(f"--group {most}: at least 1 cell")
    parts = np.array_split(np.arange(len(group.cells)), -(-len(group.cells) // most))
    return [Group(tuple(group.cells[i] for i in part)) for part in parts]
