"""MetaWorld demonstrations as numbered episodes, and as a data set."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vla_jax.data.sources import rlds
from vla_jax.sim import sources
from vla_jax.sim.collect import CollectConfig, make_source, write_shard
from vla_jax.sim.metaworld import TASKS, demonstrate, headless
from vla_jax.sim.metaworld.simulator import Simulator

pytest.importorskip("metaworld", reason="the extra `sim` is not installed")
try:
    headless.prepare()
except OSError as _error:
    pytest.skip(f"no headless OpenGL here: {_error}", allow_module_level=True)

ENV = "metaworld:reach-v3*4,button-press-v3"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return CollectConfig(
        env=ENV, episodes=2, shard_size=3, image_size=32, out=tmp_path_factory.mktemp("mw") / "d"
    )


def test_tasks_are_interleaved_and_every_second_episode_is_noisy(config):
    source = make_source(config)
    episodes = list(source.episodes(0, source.total))
    tasks = [episode.metadata["task"] for episode in episodes]
    assert tasks == ["reach-v3", "button-press-v3", "reach-v3", "reach-v3", "button-press-v3", "reach-v3"]
    for task, count in (("reach-v3", 4), ("button-press-v3", 2)):
        mine = [episode for episode in episodes if episode.metadata["task"] == task]
        assert [episode.metadata["seed"] for episode in mine] == list(range(count))
        assert [episode.metadata["noisy"] for episode in mine] == [False, True] * (count // 2)
        assert {episode.language_instruction for episode in mine} == {TASKS[task].instruction}
    assert source.retries == 0


def test_data_set_holds_the_experts_episodes(config):
    source = make_source(config)
    for shard in (1, 0):
        write_shard(config, shard)
    assert rlds.finalize(config.out, source.schema, 2) == 6
    simulators = {name: Simulator(name) for name in ("reach-v3", "button-press-v3")}
    for episode in tfds.builder_from_directory(str(config.out)).as_data_source("train"):
        metadata, steps = episode["episode_metadata"], list(episode["steps"])
        simulator = simulators[metadata["task"].decode()]
        demo = demonstrate(simulator, None, int(metadata["seed"]), bool(metadata["noisy"]))
        np.testing.assert_array_equal([step["action"] for step in steps], demo.actions)
        np.testing.assert_array_equal([step["observation"]["state"] for step in steps], demo.state)
        picture = steps[-1]["observation"]["corner2"]
        assert picture.shape == (32, 32, 3)
        assert picture.std() > 10
        assert steps[-1]["is_terminal"]


def test_failed_episodes_are_retried_and_counted(config, monkeypatch):
    seen = []

    def failing_once(simulator, renderer, seed, noisy):
        seen.append(seed)
        return None if seed == 0 else demonstrate(simulator, renderer, seed, noisy)

    monkeypatch.setattr(sources, "demonstrate", failing_once)
    source = make_source(config)
    (episode,) = source.episodes(0, 1)
    assert seen == [0, 4]  # the next seed that no other of the task's four episodes has
    assert episode.metadata["seed"] == 4
    assert source.retries == 1
    monkeypatch.setattr(sources, "demonstrate", lambda *args: None)
    with pytest.raises(ValueError, match="reach-v3 failed 20 times in a row"):
        list(source.episodes(0, 1))


def test_unknown_task_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'button-press-v3'"):
        make_source(CollectConfig(env="metaworld:buton-press-v3", episodes=1, out=tmp_path / "d"))
    assert not (tmp_path / "d").exists()
