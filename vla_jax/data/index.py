"""One pass over a data set without decoding images: lengths, tasks, texts; and the split by episodes."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from vla_jax.data.config import DataConfig
from vla_jax.data.derived import cached
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.sources.episode import EncodedEpisode
from vla_jax.data.sources.source import EpisodeSource

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """What must be known of every episode to sample from them."""

    fingerprint: str
    """Fingerprint of the data it was made from."""
    lengths: tuple[int, ...]
    """Steps of each episode."""
    tasks: tuple[str, ...]
    """Task of each episode."""
    texts: tuple[tuple[str, str, str], ...]
    """The different (task, instruction, text target), sorted."""

    def tasks_of_instruction(self) -> dict[str, tuple[str, ...]]:
        """Instruction → the tasks it was given for."""
        found: dict[str, set[str]] = {}
        for task, instruction, _ in self.texts:
            found.setdefault(instruction, set()).add(task)
        return {instruction: tuple(sorted(tasks)) for instruction, tasks in found.items()}


def index_dataset(source: EpisodeSource) -> DatasetIndex:
    """The index of a data set, kept beside it. Raises ValueError at the first value that is not finite."""
    fingerprint = source.fingerprint()

    def compute() -> dict[str, Any]:
        lengths, tasks, texts = [], [], set()
        for number in range(len(source)):
            episode = source.read(number)
            check_finite(episode, source.schema)
            task = episode.metadata["task"]
            lengths.append(len(episode))
            tasks.append(task)
            texts |= {(task, episode.language_instruction, target) for target in set(episode.text_target)}
        return {"lengths": lengths, "tasks": tasks, "texts": sorted(texts)}

    value = cached(source.path, "index", {"data": fingerprint, "version": _VERSION}, compute)
    return DatasetIndex(
        fingerprint=fingerprint,
        lengths=tuple(value["lengths"]),
        tasks=tuple(value["tasks"]),
        texts=tuple(tuple(text) for text in value["texts"]),
    )


def check_finite(episode: EncodedEpisode, schema: DatasetSchema) -> None:
    """Raise a ValueError that names the first state or action value which is NaN or infinite."""
    for field, values, names in (
        ("state", episode.state, schema.state_names),
        ("action", episode.action, schema.action_names),
    ):
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            step, dim = wrong[0]
            raise ValueError(
                f"episode {episode.number} (seed {episode.metadata['seed']}) step {step}: {field} "
                f"{names[dim]!r} is {values[step, dim]}; leave this episode out or mend it"
            )


def split_episodes(
    index: DatasetIndex, config: DataConfig
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " val"]]:
    """Episodes to train on and episodes held out, each ascending.

    Depends on the data set and the split's size alone, not on a run's seed. Every task gives the same share.
    """
    count = len(index.lengths)
    if config.val_episodes is not None:
        held_out = config.val_episodes
        option = f"data.val_episodes={held_out}"
    else:
        held_out = max(1, round(config.val_share * count)) if config.val_share else 0
        option = f"data.val_share={config.val_share}"
    if held_out >= count:
        raise ValueError(f"{option} leaves none of {count} episodes to train on; hold out fewer")
    # A random order within each task; the tasks are interleaved by relative rank.
    shuffled = np.random.default_rng(0).permutation(count)
    tasks = np.asarray(index.tasks)
    rank = np.empty(count)
    for task in np.unique(tasks):
        members = shuffled[tasks[shuffled] == task]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(rank[shuffled], kind="stable")]
    return np.sort(order[held_out:]), np.sort(order[:held_out])
