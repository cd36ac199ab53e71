"""The collector: what is in a shard, going on after kill -9, refusals. Tabletop only; tiny sets."""

import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.core.example_serializer import tf_example_pb2

from vla_jax.data.sources import rlds
from vla_jax.sim import collect as collecting
from vla_jax.sim import sources, tabletop
from vla_jax.sim.collect import CollectConfig, collect, make_source, parse_tasks, shard_ranges, write_shard
from vla_jax.sim.sources import ATTEMPTS, EVALUATION_SEEDS_FROM, attempt_seed, check_seeds

EPISODES, SHARD, SIZE = 12, 2, 16
RUN = """
from pathlib import Path
from vla_jax.sim.collect import CollectConfig, collect
if __name__ == "__main__":
    import sys
    out = Path(sys.argv[1])
    collect(CollectConfig(env="tabletop", episodes=12, shard_size=2, image_size=16, workers=1, out=out))
"""


def config(out, **changes):
    values = {"episodes": EPISODES, "shard_size": SHARD, "image_size": SIZE}
    values |= {"env": "tabletop", "out": Path(out)} | changes
    return CollectConfig(**values)


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def decoded(directory):
    """Like `contents`, but a protobuf map may be written in any order, so records are put in a canonical one."""
    files = contents(directory)
    del files[rlds.CHECKSUMS_FILE]
    for name in files:
        if "array_record" in name:
            reader = ArrayRecordReader(str(directory / name))
            records = map(tf_example_pb2.Example.FromString, reader.read_all())
            files[name] = [record.SerializeToString(deterministic=True) for record in records]
            reader.close()
    return files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole data set, written shard by shard in this process."""
    out = tmp_path_factory.mktemp("finished") / "tabletop"
    whole = config(out)
    source = make_source(whole)
    shards = len(shard_ranges(source.total, SHARD))
    rlds.prepare_directory(out, source.schema, shards, whole.arguments())
    for shard in reversed(range(shards)):
        write_shard(whole, shard)
    rlds.finalize(out, source.schema, shards)
    return out


@given(st.integers(1, 5000), st.integers(1, 300))
def test_shards_cover_all_episodes_once(total, size):
    ranges = shard_ranges(total, size)
    assert list(itertools.chain(*ranges)) == list(range(total))
    lengths = [len(r) for r in ranges]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert len(ranges) <= 1000
    assert max(lengths) <= max(size, -(-total // 1000))


@given(st.integers(0, 1000), st.integers(1, 5000))
def test_seeds_are_disjoint_between_slots_and_from_evaluation(first, slots):
    check_seeds(first, slots)
    corners = {(slot, attempt) for slot in (0, slots // 2, slots - 1) for attempt in (0, 1, ATTEMPTS - 1)}
    seeds = [attempt_seed(first, slot, slots, attempt) for slot, attempt in corners]
    assert len(set(seeds)) == len(corners)
    assert max(seeds) < EVALUATION_SEEDS_FROM


def test_seeds_of_evaluation_are_refused():
    with pytest.raises(ValueError, match="kept for evaluation"):
        make_source(config("unused", seed=EVALUATION_SEEDS_FROM))
    with pytest.raises(ValueError, match="kept for evaluation"):
        make_source(config("unused", episodes=60_000))
    with pytest.raises(ValueError, match="negative"):
        make_source(config("unused", seed=-1))


def test_data_set_holds_the_experts_episodes(finished):
    """Read back through TFDS and compared with the environment's own generator, seed by seed."""
    data = tfds.builder_from_directory(str(finished)).as_data_source("train")
    assert len(data) == EPISODES
    demos = tabletop.generate(tabletop.TabletopConfig(image_size=SIZE), range(EPISODES))
    for i, episode in enumerate(data):
        metadata, steps = episode["episode_metadata"], list(episode["steps"])
        record, length = demos.records[i], int(demos.lengths[i])
        assert metadata["seed"] == i
        assert metadata["success"]
        assert metadata["kind"].decode() == record["kind"]
        assert metadata["side"].decode() == (record["side"] or "")
        assert len(steps) == length
        assert steps[0]["language_instruction"].decode() == demos.instructions[i]
        assert steps[-1]["text_target"].decode() == demos.plans[i]
        np.testing.assert_allclose([s["action"] for s in steps], demos.actions[i, :length], atol=1e-6)
        np.testing.assert_allclose(
            [s["observation"]["state"] for s in steps], demos.state[i, :length], atol=1e-6
        )
        for camera, frames in demos.images.items():
            difference = steps[length // 2]["observation"][camera].astype(int) - frames[i, length // 2]
            assert np.abs(difference).max() <= 1
    assert {bool(e["episode_metadata"]["noisy"]) for e in data} == {False, True}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_noisy_says_whether_the_state_followed_the_label(share):
    """Undisturbed, the hand ends where the recorded velocities add up to."""
    source = make_source(config("unused", noisy_share=share))
    episodes = list(source.episodes(0, 8))
    dt = tabletop.TabletopConfig().dt_s
    for episode in episodes:
        end = episode.state[0, :2] + dt * episode.action[:-1, :2].sum(axis=0)
        assert episode.metadata["noisy"] == (np.abs(end - episode.state[-1, :2]).max() > 1e-4)
    noisy = [episode.metadata["noisy"] for episode in episodes]
    assert not any(noisy) if share == 0 else sum(noisy) >= 6  # bursts may miss a short episode


def test_failed_episodes_are_replaced_and_counted(monkeypatch):
    generate = tabletop.generate

    def sometimes_failing(table, seeds):
        demos = generate(table, seeds)
        for record in demos.records:
            record["success"] &= record["seed"] not in (1, 13)  # slot 1, and its first replacement
        return demos

    monkeypatch.setattr(sources.tabletop, "generate", sometimes_failing)
    source = make_source(config("unused"))
    seeds = [episode.metadata["seed"] for episode in source.episodes(0, 4)]
    assert seeds == [0, 1 + 2 * EPISODES, 2, 3]
    assert source.retries == 2


def _children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through Linux's /proc")
def test_killed_and_rerun_equals_uninterrupted(tmp_path):
    out = tmp_path / "tabletop"
    quiet = {"stderr": subprocess.DEVNULL}
    first = subprocess.Popen([sys.executable, "-c", RUN, str(out)], **quiet)
    deadline = time.monotonic() + 120
    while len(list(out.glob("tabletop-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = _children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 20
    while any(map(_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not any(map(_running, workers))
    written = contents(out)
    assert rlds.INFO_FILE not in written
    assert 2 <= sum(name.startswith("tabletop-") for name in written) < EPISODES // SHARD
    (out / ".tabletop-train.array_record-00005-of-00006.1.tmp").write_bytes(
        b"half"
    )  # as another kill leaves it

    subprocess.run([sys.executable, "-c", RUN, str(out)], check=True, **quiet)
    # The reference comes from a process of its own as well: this one may hold other tests' JAX settings.
    whole = tmp_path / "whole" / "tabletop"
    whole.parent.mkdir()
    subprocess.run([sys.executable, "-c", RUN, str(whole)], check=True, **quiet)
    assert decoded(out) == decoded(whole)
    assert (out / rlds.CHECKSUMS_FILE).exists()


def test_finished_set_is_left_alone(finished):
    times = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    report = collect(config(finished, workers=7))
    assert report.episodes == EPISODES
    assert report.new_episodes == report.frames == 0
    assert times == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


@pytest.mark.parametrize(
    "changes", [{"episodes": 13}, {"seed": 1}, {"noisy_share": 0.25}, {"image_size": 64}, {"shard_size": 3}]
)
def test_other_arguments_are_refused(finished, changes):
    before = contents(finished)
    with pytest.raises(ValueError, match=f"was collected with .*{next(iter(changes))}") as error:
        collect(config(finished, **changes))
    assert "\n" not in str(error.value)
    assert contents(finished) == before


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match="is not empty and holds no data set"):
        collect(config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "thesis.tex"]


def test_two_collectors_do_not_meet(finished):
    descriptor = os.open(finished, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another collector"):
        collect(config(finished))
    os.close(descriptor)
    collect(config(finished))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("write() failed: No space left on device; writing x; at byte 258048; Failed to close"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ],
)
def test_full_disk_is_one_clear_line(tmp_path, monkeypatch, error):
    class FullDisk:
        def __init__(self, path, options):
            self.file = open(path, "wb")  # noqa: SIM115

        def write(self, record):
            self.file.write(record)

        def close(self):
            self.file.close()
            raise error

    monkeypatch.setattr(rlds.array_record_module, "ArrayRecordWriter", FullDisk)
    out = config(tmp_path / "tabletop")
    with pytest.raises(OSError, match=r"No space left on device|Disk quota exceeded") as told:
        write_shard(out, 0)
    assert "\n" not in str(told.value)
    assert set(contents(out.out)) == {rlds.SCHEMA_FILE}
    with pytest.raises(ValueError, match="half-written"):
        rlds.finalize(out.out, make_source(out).schema, EPISODES // SHARD)


def test_dead_worker_is_one_clear_line(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs):
            pass

        def submit(self, *args):
            raise collecting.BrokenProcessPool("a process in the pool was terminated abruptly")

        def shutdown(self, **kwargs):
            pass

    monkeypatch.setattr(collecting.concurrent.futures, "ProcessPoolExecutor", Broken)
    with pytest.raises(OSError, match="a worker process was killed"):
        collect(config(tmp_path / "tabletop"))


def test_impossible_arguments():
    for changes, message in (
        ({"episodes": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"shard_size": 0}, "at least 1"),
        ({"noisy_share": 1.5}, "from 0 to 1"),
        ({"image_size": 4}, "between 8 and 480"),
    ):
        with pytest.raises(ValueError, match=message):
            config("unused", **changes)
    for env in ("table", "tabletop:red", "metaworld", "metaworld:", "libero:1"):
        with pytest.raises(ValueError, match=r"unknown; use tabletop or metaworld:TASK|did you mean"):
            make_source(config("unused", env=env))


def test_task_lists():
    assert parse_tasks("a,b*200, c", 5) == {"a": 5, "b": 200, "c": 5}
    for wrong in ("a*0", "a*x", "a*"):
        with pytest.raises(ValueError, match="TASK\\*N"):
            parse_tasks(wrong, 5)
    with pytest.raises(ValueError, match="twice"):
        parse_tasks("a,a*2", 5)
