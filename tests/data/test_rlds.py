"""Writing and reading: bit for bit, without TensorFlow, whole or recognised as not whole."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import toy
from vla_jax.data.sources import rlds
from vla_jax.data.sources.rlds_reader import RldsReader
from vla_jax.data.sources.source import EpisodeSource


def test_round_trip_is_bit_exact(dataset, episodes):
    source = EpisodeSource(dataset)
    assert source.schema == toy.SCHEMA
    assert len(source) == len(episodes)
    for number, wanted in enumerate(episodes):
        found = source.episode(number)
        assert found.state.dtype == found.action.dtype == np.float32
        np.testing.assert_array_equal(found.state, wanted.state)
        np.testing.assert_array_equal(found.action, wanted.action)
        for camera, frames in wanted.images.items():
            for step in range(len(wanted)):
                np.testing.assert_array_equal(found.frame(camera, step), frames[step])
        assert found.language_instruction == wanted.language_instruction
        assert found.text_target == (wanted.text_target,) * len(wanted)
        assert found.metadata == {"kind": "", "noisy": False, **wanted.metadata}


def test_tfds_reads_it_as_rlds(dataset, episodes):
    source = tfds.builder_from_directory(dataset).as_data_source("train")
    for record, wanted in zip(source, episodes, strict=True):
        steps = list(record["steps"])
        flags = {
            flag: [bool(step[flag]) for step in steps] for flag in ("is_first", "is_last", "is_terminal")
        }
        last = [False] * (len(wanted) - 1)
        assert flags["is_first"] == [True, *last]
        assert flags["is_last"] == [*last, True]
        assert flags["is_terminal"] == [*last, wanted.metadata["success"]]
        np.testing.assert_array_equal([step["action"] for step in steps], wanted.action)
        np.testing.assert_array_equal([step["observation"]["top"] for step in steps], wanted.images["top"])
        assert record["episode_metadata"]["seed"] == wanted.metadata["seed"]


def test_text_target_per_step(tmp_path):
    targets = ("go", "", "grasp — é")
    toy.write(tmp_path, [toy.make_episode(1, length=3, text_target=targets)], shards=1)
    assert EpisodeSource(tmp_path).episode(0).text_target == targets


def test_tensorflow_is_never_imported(tmp_path):
    program = f"""
        import sys
        from tests.data import toy
        from vla_jax.data.bundle import prepare
        from vla_jax.data.config import DataConfig
        from vla_jax.data.loader import make_loader
        toy.write({str(tmp_path)!r}, [toy.make_episode(seed) for seed in range(4)])
        config = DataConfig(path={str(tmp_path)!r}, val_episodes=1, image_size=8)
        loader = make_loader(config, prepare(config), horizon=2, batch_size=4, seed=0)
        next(loader.iterate())
        heavy = {{"tensorflow", "torch", "transformers"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=_environment())


def test_pickled_source_reopens(dataset, episodes):
    source = pickle.loads(pickle.dumps(EpisodeSource(dataset)))
    np.testing.assert_array_equal(source.episode(3).action, episodes[3].action)


def test_threads_share_a_small_cache(tmp_path):
    length = 400  # about 0.18 MB of noise per episode: the cache holds some of them
    episodes = [toy.make_episode(seed, length=length) for seed in range(8)]
    source = EpisodeSource(toy.write(tmp_path, episodes, shards=1), cache_mb=1)
    failures = []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 60):
            if not np.array_equal(source.episode(int(number)).state, episodes[number].state):
                failures.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    kept = [source._cache[number].nbytes for number in source._cache]
    assert 1 <= len(kept) < 8
    assert sum(kept) == source._cached_bytes <= 2**20


def test_least_recently_used_leaves_first(tmp_path):
    source = EpisodeSource(toy.write(tmp_path, [toy.make_episode(s, length=500) for s in range(4)], shards=1))
    source.cache_mb = 1
    sizes = [source.read(number).nbytes for number in range(4)]
    assert sum(sizes[:3]) < 2**20 < sum(sizes)
    for number in (0, 1, 2, 0, 3):
        source.episode(number)
    assert 0 in source._cache and 1 not in source._cache


def test_fingerprint_follows_the_files(tmp_path):
    source = EpisodeSource(toy.write(tmp_path, [toy.make_episode(seed) for seed in range(4)]))
    seen = {source.fingerprint()}
    with open(rlds.shard_path(tmp_path, toy.SCHEMA, 0, 2), "ab") as shard:
        shard.write(b"more")
    seen.add(source.fingerprint())
    toy.write(tmp_path, [toy.make_episode(seed) for seed in range(1, 5)])
    seen.add(EpisodeSource(tmp_path).fingerprint())
    assert len(seen) == 3
    (tmp_path / "notes.txt").write_text("not data")
    assert EpisodeSource(tmp_path).fingerprint() in seen


class TestHalfWritten:
    def test_shards_can_be_finished_later(self, tmp_path):
        episodes = [toy.make_episode(seed) for seed in range(4)]
        assert rlds.missing_shards(tmp_path / "new", toy.SCHEMA, 3) == (0, 1, 2)
        rlds.write_shard(tmp_path, toy.SCHEMA, 1, 3, episodes[:2])
        assert rlds.missing_shards(tmp_path, toy.SCHEMA, 3) == (0, 2)
        with pytest.raises(ValueError, match=r"half-written: 2 of 3 shards are missing \(0, 2\)"):
            rlds.finalize(tmp_path, toy.SCHEMA, 3)
        with pytest.raises(ValueError, match=r"half-written \(1 of 3 shards\); run the same launch.collect"):
            EpisodeSource(tmp_path)
        rlds.write_shard(tmp_path, toy.SCHEMA, 0, 3, episodes[2:3])
        rlds.write_shard(tmp_path, toy.SCHEMA, 2, 3, episodes[3:])
        with pytest.raises(ValueError, match=r"half-written \(3 of 3 shards\)"):
            EpisodeSource(tmp_path)
        assert rlds.finalize(tmp_path, toy.SCHEMA, 3) == 4
        assert len(EpisodeSource(tmp_path)) == 4

    def test_an_exception_in_the_middle_leaves_nothing(self, tmp_path):
        def episodes():
            yield toy.make_episode(0)
            raise RuntimeError("simulator died")

        with pytest.raises(RuntimeError, match="simulator died"):
            rlds.write_shard(tmp_path, toy.SCHEMA, 0, 1, episodes())
        assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]

    def test_a_killed_writer_leaves_no_shard(self, tmp_path):
        program = f"""
            import os, signal
            from tests.data import toy
            from vla_jax.data.sources import rlds
            def episodes():
                yield toy.make_episode(0)
                os.kill(os.getpid(), signal.SIGKILL)
            rlds.write_shard({str(tmp_path)!r}, toy.SCHEMA, 0, 1, episodes())
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=_environment())
        assert done.returncode == -signal.SIGKILL
        assert rlds.missing_shards(tmp_path, toy.SCHEMA, 1) == (0,)
        assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        toy.write(tmp_path, [toy.make_episode(seed) for seed in range(3)], shards=1)
        assert len(EpisodeSource(tmp_path)) == 3
        assert not any(path.name.endswith(".tmp") for path in tmp_path.iterdir())

    def test_rewriting_a_shard_unfinishes_the_data_set(self, tmp_path):
        toy.write(tmp_path, [toy.make_episode(seed) for seed in range(4)])
        rlds.write_shard(tmp_path, toy.SCHEMA, 0, 2, [toy.make_episode(7)])
        with pytest.raises(ValueError, match="half-written"):
            EpisodeSource(tmp_path)
        assert rlds.finalize(tmp_path, toy.SCHEMA, 2) == 3

    def test_a_full_disk_leaves_nothing(self, tmp_path):
        program = f"""
            import resource, signal
            from tests.data import toy
            from vla_jax.data.sources import rlds
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            rlds.prepare_directory({str(tmp_path)!r}, toy.SCHEMA, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            rlds.write_shard({str(tmp_path)!r}, toy.SCHEMA, 0, 1, [toy.make_episode(0, length=2000)])
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 1
        assert "OSError: cannot write" in done.stderr and "make room" in done.stderr.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]


class TestErrors:
    def test_missing_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no data set in .*nothing .*launch.collect --out"):
            EpisodeSource(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=r"data.path is empty"):
            EpisodeSource("")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cameras": {"top": (8, 8)}}, r"camera wrist \(8, 8\) against absent"),
            ({"cameras": {"top": (8, 8), "wrist": (4, 8)}}, r"camera wrist \(8, 8\) against \(4, 8\)"),
            ({"state_names": ("x",)}, r"state 2 dims \['x', 'y'\] against 1 dims \['x'\]"),
            ({"control_hz": 20}, "control_hz 10 against 20"),
        ],
    )
    def test_another_schema(self, tmp_path, change, message):
        rlds.write_shard(tmp_path, toy.SCHEMA, 0, 2, [toy.make_episode(0)])
        other = dataclasses.replace(toy.SCHEMA, **change)
        with pytest.raises(ValueError, match=f"another schema .*{message}"):
            rlds.write_shard(tmp_path, other, 1, 2, [toy.make_episode(1, schema=other)])

    def test_another_number_of_shards_or_arguments(self, tmp_path):
        rlds.prepare_directory(tmp_path, toy.SCHEMA, 2, {"seed": 1, "out": "a"})
        rlds.prepare_directory(tmp_path, toy.SCHEMA, 2, {"seed": 1, "out": "a"})
        with pytest.raises(ValueError, match=r"begun with 2 shards, not 4; use 2"):
            rlds.prepare_directory(tmp_path, toy.SCHEMA, 4)
        with pytest.raises(ValueError, match=r"other arguments .seed=1 not 2"):
            rlds.prepare_directory(tmp_path, toy.SCHEMA, 2, {"seed": 2, "out": "a"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"state": np.zeros((4, 3), np.float32)}, r"state: float32\[4, 3\].*says float32\[4, 2\]"),
            ({"state": np.zeros((4, 2))}, "state: float64"),
            ({"action": np.zeros((3, 3), np.float32)}, r"action: float32\[3, 3\]"),
            ({"images": {}}, "episode has"),
            ({"text_target": ("a",)}, "4 steps has 1 text targets"),
            ({"metadata": {"seed": 1, "task": "t"}}, r"lacks \['success'\]"),
            ({"metadata": {"seed": 1, "task": "t", "success": 1.5}}, "success=1.5: must be bool"),
            ({"metadata": {"sed": 1}}, "'sed': unknown"),
        ],
    )
    def test_an_episode_that_is_not_of_the_schema(self, tmp_path, change, message):
        with pytest.raises(ValueError, match=f"episode 1 of shard 0: .*{message}"):
            bad = toy.make_episode(1, length=4, **change)
            rlds.write_shard(tmp_path, toy.SCHEMA, 0, 1, [toy.make_episode(0), bad])

    def test_no_episodes(self, tmp_path):
        with pytest.raises(ValueError, match=r"shard 0 .* got no episodes"):
            rlds.write_shard(tmp_path, toy.SCHEMA, 0, 1, [])

    def test_features_that_disagree_with_the_schema(self, tmp_path):
        toy.write(tmp_path, [toy.make_episode(0)], shards=1)
        path = tmp_path / "schema.json"
        values = json.loads(path.read_text())
        values["schema"]["action_names"].append("extra")
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"steps/action is float32\[3\], not float32\[4\]"):
            EpisodeSource(tmp_path)

    def test_a_truncated_shard(self, tmp_path):
        toy.write(tmp_path, [toy.make_episode(seed) for seed in range(4)], shards=1)
        shard = rlds.shard_path(tmp_path, toy.SCHEMA, 0, 1)
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=r"cannot be read|not a readable data set"):
            EpisodeSource(tmp_path).episode(3)
        with pytest.raises(ValueError, match=r"is damaged .* restore it from a copy"):
            rlds.finalize(tmp_path, toy.SCHEMA, 1)

    def test_a_record_that_is_no_episode(self, tmp_path):
        toy.write(tmp_path, [toy.make_episode(0)], shards=1)
        writer = rlds.array_record_module.ArrayRecordWriter(
            str(rlds.shard_path(tmp_path, toy.SCHEMA, 0, 1)), "group_size:1"
        )
        writer.write(b"not a proto")
        writer.close()
        with pytest.raises(
            ValueError, match=r"episode 0 of .* cannot be read .* restore the file from a copy"
        ):
            EpisodeSource(tmp_path).episode(0)

    def test_an_image_that_cannot_be_decoded(self, dataset):
        episode = EpisodeSource(dataset).episode(2)
        broken = dataclasses.replace(episode, png={"top": (b"\x89PNG but no more",)})
        with pytest.raises(ValueError, match="episode 2 step 0: the image of camera top cannot be decoded"):
            broken.frame("top", 0)


def _environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}


def test_another_kind_of_data_set_is_a_reader_and_a_line(dataset, tmp_path, monkeypatch):
    """Found by its sign, opened again in another process, and read through the same cache."""
    from vla_jax.data import sources

    class Doubled(RldsReader):
        sign = "doubled.txt"

        def __init__(self, path):
            super().__init__(Path((path / self.sign).read_text()))

        def read(self, number):
            episode = super().read(number)
            return dataclasses.replace(episode, action=2 * episode.action)

    (tmp_path / "doubled.txt").write_text(str(dataset))
    with pytest.raises(FileNotFoundError, match=r"no data set in .*\(schema.json is missing\)"):
        EpisodeSource(tmp_path)
    monkeypatch.setitem(sources.SOURCES, "doubled", Doubled)
    plain, doubled = EpisodeSource(dataset), pickle.loads(pickle.dumps(EpisodeSource(tmp_path)))
    assert doubled.schema == plain.schema and len(doubled) == len(plain)
    np.testing.assert_array_equal(doubled.episode(1).action, 2 * plain.episode(1).action)
    assert doubled.episode(1) is doubled.episode(1)
    with pytest.raises(FileNotFoundError, match=r"\(schema.json or doubled.txt is missing\)"):
        EpisodeSource(tmp_path / "nothing")
