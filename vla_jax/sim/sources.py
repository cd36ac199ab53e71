"""Where demonstrations come from: numbered expert episodes, each a pure function of its number.

Seeds below `EVALUATION_SEEDS_FROM` are for demonstrations, those from it on for evaluation, so that no policy is
ever tested on a scene from its data.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from vla_jax.data.schema import DatasetSchema, Episode
from vla_jax.sim import tabletop
from vla_jax.sim.env import EnvSpec
from vla_jax.sim.metaworld.demos import demonstrate
from vla_jax.sim.metaworld.env import metaworld_spec
from vla_jax.sim.metaworld.headless import prepare
from vla_jax.sim.metaworld.render import CAMERA, Renderer
from vla_jax.sim.metaworld.simulator import Simulator
from vla_jax.sim.metaworld.tasks import find_task
from vla_jax.sim.tabletop.env import make_spec

EVALUATION_SEEDS_FROM = 1_000_000
ATTEMPTS = 20
"""Seeds that an episode may use up before its expert counts as unable to succeed."""
_ROUNDING_M = 1e-5


class DemonstrationSource(Protocol):
    """Numbered demonstrations; only successful ones are given out."""

    schema: DatasetSchema
    total: int
    shard_size: int
    retries: int
    """How many episodes were thrown away so far, because the expert failed in them."""

    def episodes(self, start: int, stop: int) -> Iterator[Episode]:
        """The episodes with numbers start … stop-1."""
        ...


def attempt_seed(first: int, slot: int, slots: int, attempt: int) -> int:
    """The seed of an episode's attempt: slots count up from `first`, retries go on after all slots."""
    return first + slot + attempt * slots


def check_seeds(first: int, slots: int) -> None:
    """Refuses collections whose seeds might reach those of evaluation."""
    if first < 0:
        raise ValueError(f"--seed {first} is negative")
    if first + slots * ATTEMPTS > EVALUATION_SEEDS_FROM:
        raise ValueError(
            f"{slots} episodes from seed {first} may need seeds up to {first + slots * ATTEMPTS}, but those from "
            f"{EVALUATION_SEEDS_FROM} on are kept for evaluation; collect fewer or start at a smaller --seed"
        )


def schema_of(spec: EnvSpec) -> DatasetSchema:
    """The schema of what an environment shows and takes."""
    return DatasetSchema(
        name=spec.name,
        robot=spec.name,
        cameras=spec.cameras,
        state_names=spec.state_names,
        action_names=spec.action_names,
        control_hz=spec.control_hz,
    )


class TabletopSource:
    """Tabletop demonstrations, computed in jitted batches."""

    shard_size = 256

    def __init__(self, episodes: int, seed: int, noisy_share: float, image_size: int, batch: int):
        check_seeds(seed, episodes)
        self._batch = batch
        self._config = tabletop.TabletopConfig(noisy_fraction=noisy_share, image_size=image_size)
        self._first = seed
        self.schema = schema_of(make_spec(self._config))
        self.total = episodes
        self.retries = 0

    def episodes(self, start: int, stop: int) -> Iterator[Episode]:
        """The episodes with numbers start … stop-1."""
        for low in range(start, stop, self._batch):
            yield from self._one_batch(range(low, min(low + self._batch, stop)))

    def _one_batch(self, slots: range) -> list[Episode]:
        done: dict[int, Episode] = {}
        for attempt in range(ATTEMPTS):
            left = [slot for slot in slots if slot not in done]
            if not left:
                break
            self.retries += len(left) if attempt else 0
            seeds = [attempt_seed(self._first, slot, self.total, attempt) for slot in left]
            # Always the same batch size, so that one program is compiled; what is filled up is thrown away.
            padded = np.resize(seeds, self._batch)
            demos = tabletop.generate(self._config, padded)
            for i, slot in enumerate(left):
                if demos.records[i]["success"]:
                    done[slot] = _tabletop_episode(demos, i, self._config.dt_s)
        if len(done) < len(slots):
            raise ValueError(f"the tabletop's expert failed {ATTEMPTS} times in a row; lower --noisy-share")
        return [done[slot] for slot in slots]


def _tabletop_episode(demos: tabletop.Demonstrations, i: int, dt_s: float) -> Episode:
    """The i-th episode. It counts as noisy if the hand ever moved otherwise than the recorded actions say."""
    record, length = demos.records[i], int(demos.lengths[i])
    moved = np.diff(demos.state[i, :length, :2], axis=0)
    noisy = bool(np.any(np.abs(moved - dt_s * demos.actions[i, : length - 1, :2]) > _ROUNDING_M))
    return Episode(
        images={name: frames[i, :length] for name, frames in demos.images.items()},
        state=demos.state[i, :length],
        action=demos.actions[i, :length],
        language_instruction=demos.instructions[i],
        text_target=demos.plans[i],
        metadata={
            "seed": record["seed"],
            "task": record["task"],
            "kind": record["kind"],
            "side": record["side"] or "",
            "success": record["success"],
            "noisy": noisy,
        },
    )


@dataclasses.dataclass(frozen=True)
class _Slot:
    task: str
    index: int
    count: int

    def noisy(self, share: float) -> bool:
        """Spreads the noisy episodes evenly: after n slots of a task, floor(n · share) were noisy."""
        return int((self.index + 1) * share) > int(self.index * share)


class MetaWorldSource:
    """MetaWorld demonstrations, one simulation and one renderer per process; tasks are interleaved."""

    shard_size = 10

    def __init__(self, counts: dict[str, int], seed: int, noisy_share: float, image_size: int):
        for task, count in counts.items():
            find_task(task)
            check_seeds(seed, count)
        prepare()
        self._first, self._noisy_share, self._image_size = seed, noisy_share, image_size
        slots = [_Slot(task, i, count) for task, count in counts.items() for i in range(count)]
        self._slots = sorted(slots, key=lambda slot: (slot.index + 0.5) / slot.count)
        self._simulators: dict[str, Simulator] = {}
        self._renderer: Renderer | None = None
        self.schema = schema_of(metaworld_spec(image_size))
        self.total = len(slots)
        self.retries = 0

    def episodes(self, start: int, stop: int) -> Iterator[Episode]:
        """The episodes with numbers start … stop-1."""
        for slot in self._slots[start:stop]:
            yield self._episode(slot)

    def _episode(self, slot: _Slot) -> Episode:
        noisy = slot.noisy(self._noisy_share)
        if self._renderer is None:
            self._renderer = Renderer(self._image_size)
        if slot.task not in self._simulators:
            self._simulators[slot.task] = Simulator(slot.task)
            self._renderer.add_model(slot.task, self._simulators[slot.task].model)
        for attempt in range(ATTEMPTS):
            seed = attempt_seed(self._first, slot.index, slot.count, attempt)
            demo = demonstrate(self._simulators[slot.task], self._renderer, seed, noisy)
            if demo is not None:
                break
            self.retries += 1
        else:
            raise ValueError(
                f"the expert of {slot.task} failed {ATTEMPTS} times in a row; lower --noisy-share"
            )
        return Episode(
            images={CAMERA: demo.images},
            state=demo.state,
            action=demo.actions,
            language_instruction=find_task(slot.task).instruction,
            text_target="",
            metadata={"seed": seed, "task": slot.task, "success": True, "noisy": noisy},
        )
