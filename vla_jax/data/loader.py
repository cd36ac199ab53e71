"""Batches of frames with the action chunks that follow them, as a pure function of (seed, step).

Global batch n holds the samples n·B … n·B + B - 1 of one endless order, whatever the number of hosts, threads
or worker processes; each host builds its own `rows` of it. The order is grain's index shuffle: every epoch
takes each frame once, in another order, and an epoch may end inside a batch. With task weights there is one
such order per task, and grain interleaves them in fixed proportions.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Int

from vla_jax.data.bundle import DataBundle
from vla_jax.data.config import DataConfig
from vla_jax.data.index import DatasetIndex, index_dataset, split_episodes
from vla_jax.data.sample import Sample
from vla_jax.data.sources.source import EpisodeSource
from vla_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loader:
    """Random access to batches; made by `make_loader`. It pickles, so that worker processes can have one."""

    source: EpisodeSource
    bundle: DataBundle
    config: DataConfig
    frames: Int[np.ndarray, "frames 2"]
    """Episode and step of every frame of the split."""
    order: grain.MapDataset
    """Endless: position → row of `frames`."""
    horizon: int
    batch_size: int
    """Samples of the global batch, over all processes."""
    rows: tuple[int, ...]
    """The rows of the global batch that this loader builds."""

    def batch(self, step: int) -> Batch:
        """This host's rows of global batch `step`; leaves are numpy arrays."""
        first = step * self.batch_size
        return self.bundle.batch([self.sample(first + row) for row in self.rows])

    def sample(self, position: int) -> Sample:
        """One sample of the endless order, in the robot's units."""
        number, step = self.frames[self.order[position]]
        episode = self.source.episode(int(number))
        actions, exists = chunk(episode.action, int(step), self.horizon)
        valid = exists | (self.config.after_end == "repeat")
        return Sample(
            images={camera: episode.frame(camera, step) for camera in self.bundle.sources.values()},
            state=episode.state[step],
            instruction=episode.language_instruction,
            text_target=episode.text_target[step],
            task=episode.metadata["task"],
            actions=actions,
            action_mask=np.broadcast_to(valid[:, None], actions.shape),
        )

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """batch(start_step), batch(start_step + 1), … without end, built ahead by threads or processes."""
        config = self.config
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self.batch)
        batches = steps.to_iter_dataset(
            grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
        )
        if config.workers:
            if not flags.FLAGS.is_parsed():  # grain asks absl's flags, which other launchers never parse
                flags.FLAGS.mark_as_parsed()
            per_worker = math.ceil(config.prefetch / config.workers)
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=per_worker)
            )
        yield from batches

    def example_batch(self) -> Batch:
        """The first batch, to look at and to trace with."""
        return self.batch(0)

    def val_batches(self, count: int) -> tuple[Batch, ...]:
        """The first `count` batches; for a "val" loader always the same ones, whatever the seed."""
        return tuple(self.batch(step) for step in range(count))


def make_loader(
    config: DataConfig,
    bundle: DataBundle,
    *,
    horizon: int,
    batch_size: int,
    seed: int,
    split: Literal["train", "val"] = "train",
    rows: Sequence[int] | None = None,
) -> Loader:
    """A loader of one split.

    `rows` are the rows of each global batch to be built here (default: all), in the order in which the batch is
    to hold them; see `vla_jax.sharding.local_rows`. The order of "val" does not
    depend on `seed`, so that runs of different seeds are compared on the same frames.
    """
    rows = tuple(range(batch_size) if rows is None else rows)
    if horizon < 1 or not rows or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"horizon {horizon}, rows {rows} of batch {batch_size}: impossible")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be in [0, 2**32)")
    source = EpisodeSource(config.path, cache_mb=config.cache_mb)
    if source.schema != bundle.schema:
        difference = bundle.schema.difference(source.schema)
        raise ValueError(
            f"{config.path} is not what the model was made for (model against data): {difference}"
        )
    index = index_dataset(source)
    episodes = dict(zip(("train", "val"), split_episodes(index, config)))[split]
    if len(episodes) == 0:
        raise ValueError("no episodes are held out for validation; set data.val_share or data.val_episodes")
    lengths = np.asarray(index.lengths)[episodes]
    steps = np.concatenate([np.arange(length) for length in lengths])
    frames = np.stack([np.repeat(episodes, lengths), steps], axis=1)
    return Loader(
        source=source,
        bundle=bundle,
        config=config,
        frames=frames,
        order=_order(config, index, frames, 0 if split == "val" else seed),
        horizon=horizon,
        batch_size=batch_size,
        rows=rows,
    )


def chunk(
    action: Float[np.ndarray, "T a"], step: int, horizon: int
) -> tuple[Float[np.ndarray, "k a"], Bool[np.ndarray, " k"]]:
    """The `horizon` actions from `step` on, and which exist; beyond the end the last action is repeated."""
    wanted = np.arange(step, step + horizon)
    return action[np.minimum(wanted, len(action) - 1)], wanted < len(action)


def _order(config: DataConfig, index: DatasetIndex, frames: np.ndarray, seed: int) -> grain.MapDataset:
    weights = config.weights()
    if not weights:
        return grain.MapDataset.range(len(frames)).seed(seed).shuffle().repeat()
    tasks = set(index.tasks)
    if weights.keys() != tasks:
        raise ValueError(
            f"data.task_weights must name every task of the data set once: missing {sorted(tasks - weights.keys())}, "
            f"unknown {sorted(weights.keys() - tasks)}"
        )
    task_of_frame = np.asarray(index.tasks)[frames[:, 0]]
    parts, shares = [], []
    for number, task in enumerate(sorted(task for task in tasks if weights[task] > 0)):
        members = np.flatnonzero(task_of_frame == task)
        if len(members) == 0:
            raise ValueError(
                f"task {task!r} has a weight but no episode in this split; hold out fewer or more"
            )
        # Each task has a seed of its own, or their orders would be copies of one another.
        part_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        parts.append(grain.MapDataset.source(members.tolist()).seed(part_seed).shuffle().repeat())
        shares.append(weights[task])
    return grain.MapDataset.mix(parts, [share / sum(shares) for share in shares])
