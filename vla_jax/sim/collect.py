"""Collects demonstrations into an RLDS data set, in parallel processes that each write whole shards.

What a shard holds depends on the arguments alone, not on the workers, and it appears only when it is whole. So
running the same command again after any stop writes what is missing, and the files are the same as without it.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm

from vla_jax.data.schema import Episode
from vla_jax.data.sources import rlds
from vla_jax.files import read_json
from vla_jax.finite import finite
from vla_jax.sim.sources import DemonstrationSource, MetaWorldSource, TabletopSource

_MAX_SHARDS = 1000
_TABLETOP_BATCH = 128
#: Temporary names that the writer leaves behind when it is killed.
_LEFTOVER = re.compile(r"\.(.*\.array_record-.*\.tmp|\w+\.json\..*|metadata-.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class CollectConfig:
    """What is demonstrated, how often, and where to."""

    env: str
    """tabletop, or metaworld:TASK,TASK,…; TASK*N collects N episodes of a task instead of --episodes."""
    episodes: int
    """Successful episodes: in all for the tabletop, per task for MetaWorld."""
    out: Path
    """Directory of the data set. The same command goes on where an earlier one stopped."""
    noisy_share: float = 0.5
    """Share of episodes in which the executed actions are disturbed; the recorded ones stay the expert's own."""
    workers: int = 2
    """Parallel processes. Does not change what is collected."""
    seed: int = 0
    """First seed; episodes and retries count up from it. Seeds from 1000000 on are kept for evaluation."""
    image_size: int = 64
    """Height and width of the pictures, in pixels."""
    shard_size: int | None = None
    """Episodes per file; by default 256 for the tabletop and 10 for MetaWorld."""

    def __post_init__(self) -> None:
        """Refuses impossible numbers."""
        for name in ("episodes", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"shard_size {self.shard_size} must be at least 1")
        if not 0 <= self.noisy_share <= 1:
            raise ValueError(f"noisy_share {self.noisy_share} is a share; use a number from 0 to 1")
        if not 8 <= self.image_size <= 480:
            raise ValueError(f"image_size {self.image_size} is not between 8 and 480 pixels")

    def arguments(self) -> dict[str, Any]:
        """What the content depends on: everything but the place and the workers."""
        values = dataclasses.asdict(self)
        del values["out"], values["workers"]
        return values


class CollectReport(NamedTuple):
    """What one run of the collector did. `frames`, `retries`, `seconds` are this run's, the rest the whole set's."""

    episodes: int
    bytes: int
    new_episodes: int
    frames: int
    retries: int
    seconds: float


class _ShardReport(NamedTuple):
    episodes: int
    frames: int
    retries: int


def make_source(config: CollectConfig) -> DemonstrationSource:
    """The source that `config.env` names. Raises ValueError for one that does not exist."""
    kind, _, rest = config.env.partition(":")
    if kind == "tabletop" and not rest:
        batch = min(_TABLETOP_BATCH, config.episodes, config.shard_size or _TABLETOP_BATCH)
        return TabletopSource(config.episodes, config.seed, config.noisy_share, config.image_size, batch)
    if kind == "metaworld" and rest:
        counts = parse_tasks(rest, config.episodes)
        return MetaWorldSource(counts, config.seed, config.noisy_share, config.image_size)
    raise ValueError(f"--env {config.env!r} is unknown; use tabletop or metaworld:TASK,TASK,…")


def parse_tasks(text: str, episodes: int) -> dict[str, int]:
    """``a,b*200`` → {a: episodes, b: 200}."""
    counts: dict[str, int] = {}
    for item in text.split(","):
        name, star, number = item.strip().partition("*")
        if star and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"--env: {item!r} should be TASK or TASK*N with N at least 1")
        if name in counts:
            raise ValueError(f"--env names the task {name} twice")
        counts[name] = int(number) if star else episodes
    return counts


def shard_ranges(total: int, size: int) -> list[range]:
    """Episode numbers per shard: as few shards as `size` allows (never over 1000), equally full to one episode."""
    shards = min(-(-total // size), _MAX_SHARDS)
    edges = [shard * total // shards for shard in range(shards + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


def collect(config: CollectConfig) -> CollectReport:
    """Writes the data set, or what is missing of it.

    Raises ValueError for a directory that was begun with other arguments or is none of ours, OSError on a full
    disk and the like. Whatever happens, a directory without ``dataset_info.json`` is not a finished data set.
    """
    start = time.monotonic()
    source = make_source(config)
    ranges = shard_ranges(source.total, config.shard_size or source.shard_size)
    with _exclusive(config.out):
        _check_directory(config)
        _remove_leftovers(config.out)
        rlds.prepare_directory(config.out, source.schema, len(ranges), config.arguments())
        missing = rlds.missing_shards(config.out, source.schema, len(ranges))
        done = _collect_shards(config, missing, source.total, sum(len(ranges[shard]) for shard in missing))
        if missing or not (config.out / rlds.INFO_FILE).exists():
            rlds.finalize(config.out, source.schema, len(ranges))
        size = sum(path.stat().st_size for path in config.out.iterdir() if path.is_file())
    return CollectReport(
        episodes=source.total,
        bytes=size,
        new_episodes=sum(report.episodes for report in done),
        frames=sum(report.frames for report in done),
        retries=sum(report.retries for report in done),
        seconds=time.monotonic() - start,
    )


def _collect_shards(
    config: CollectConfig, missing: tuple[int, ...], total: int, left: int
) -> list[_ShardReport]:
    done: list[_ShardReport] = []
    if not missing:
        return done
    workers = min(config.workers, len(missing))
    # Spawned, not forked: neither JAX's threads nor OpenGL's state survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    bar = tqdm.tqdm(total=total, initial=total - left, unit="episode", desc=config.env.partition(":")[0])
    try:
        with bar:
            futures = [pool.submit(write_shard, config, shard) for shard in missing]
            for future in concurrent.futures.as_completed(futures):
                done.append(future.result())
                bar.update(done[-1].episodes)
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed (out of memory?); the same command goes on, perhaps with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return done


def write_shard(config: CollectConfig, shard: int) -> _ShardReport:
    """What one worker does: writes one shard of the data set."""
    source = _worker_source(config)
    ranges = shard_ranges(source.total, config.shard_size or source.shard_size)
    numbers = ranges[shard]
    before, frames = source.retries, 0

    def counted() -> Iterator[Episode]:
        nonlocal frames
        for episode in source.episodes(numbers.start, numbers.stop):
            frames += len(episode)
            yield episode

    episodes = rlds.write_shard(config.out, source.schema, shard, len(ranges), counted())
    return _ShardReport(episodes, frames, source.retries - before)


@functools.lru_cache(maxsize=1)
def _worker_source(config: CollectConfig) -> DemonstrationSource:
    """A worker keeps its simulations and compiled programs from one shard to the next."""
    return make_source(config)


def _start_worker() -> None:
    jax.config.update("jax_platforms", "cpu")  # demonstrations must not take the accelerator from a training
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers would outlive a parent that is killed, and wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # it runs in a pool
    wait([parent.sentinel])
    os._exit(1)


def _check_directory(config: CollectConfig) -> None:
    """Refuses a directory with foreign content, and one that was begun with other arguments."""
    names = {path.name for path in config.out.iterdir() if not _LEFTOVER.fullmatch(path.name)}
    if names and rlds.SCHEMA_FILE not in names:
        raise ValueError(f"{config.out} is not empty and holds no data set; use a new directory")
    if rlds.ARGUMENTS_FILE not in names:
        return
    before = read_json(config.out / rlds.ARGUMENTS_FILE, mend=rlds.WITHOUT_ARGUMENTS)
    now = config.arguments()
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        what = ", ".join(f"{key} {before.get(key)!r}, not {now.get(key)!r}" for key in differing)
        raise ValueError(f"{config.out} was collected with {what}; repeat that or use a new directory")


def _remove_leftovers(out: Path) -> None:
    """Temporary files of a collector that was killed. Ours is the only one, see `_exclusive`."""
    for path in out.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Makes the directory and locks it; the system unlocks it when this process ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another collector is writing to {out}; wait for it") from None
        yield
    finally:
        os.close(descriptor)
