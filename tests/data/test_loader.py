"""The loader: chunks against brute force, and an order that depends on nothing but seed and step."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import toy
from vla_jax.data.bundle import DataBundle, prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.index import DatasetIndex, split_episodes
from vla_jax.data.loader import chunk, make_loader
from vla_jax.types import Observation


@pytest.fixture(scope="module")
def config(dataset):
    return DataConfig(path=str(dataset), val_episodes=2, vocab_size=400, max_text_tokens=24, image_size=8)


@pytest.fixture(scope="module")
def bundle(config):
    return prepare(config)


def same(one, other):
    leaves = jax.tree.leaves_with_path(one), jax.tree.leaves_with_path(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), (_, b) in zip(*leaves):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 12), horizon=st.integers(1, 20), data=st.data())
def test_chunk_against_brute_force(length, horizon, data):
    step = data.draw(st.integers(0, length - 1))
    action = np.random.default_rng(length).normal(size=(length, 2))
    found, valid = chunk(action, step, horizon)
    assert found.shape == (horizon, 2)
    for k in range(horizon):
        assert valid[k] == (step + k < length)
        np.testing.assert_array_equal(found[k], action[step + k] if step + k < length else action[-1])


def test_batch_against_the_episodes(config, episodes):
    """Every row of an epoch, undone, is what was recorded at its frame."""
    bundle = prepare(config, state_dim=4, action_dim=5)
    loader = make_loader(config, bundle, horizon=4, batch_size=len(make_frames(config)), seed=3)
    batch = loader.batch(0)
    assert batch.actions.dtype == batch.state.dtype == np.float32 and batch.tokens.dtype == np.int32
    seen = set()
    for row in range(loader.batch_size):
        number, step = loader.frames[loader.order[row]]
        seen.add((number, step))
        episode = episodes[number]
        np.testing.assert_array_equal(batch.images["top"][row], episode.images["top"][step])
        np.testing.assert_array_equal(batch.images["wrist"][row], episode.images["wrist"][step])
        left = len(episode) - step
        mask = np.zeros((4, 5), bool)
        mask[:left, :3] = True
        np.testing.assert_array_equal(batch.action_mask[row], mask)
        assert not batch.actions[row, :, 3:].any() and not batch.state[row, 2:].any()
        mean, std = (np.asarray(getattr(bundle.normalize.statistics[""].action, f)) for f in ("mean", "std"))
        actions = batch.actions[row, :, :3] * std + mean
        np.testing.assert_allclose(actions[:left], episode.action[step : step + 4], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actions[left:], np.repeat(episode.action[-1:], max(0, 4 - left), 0), 1e-4)
        target = bundle.tokenizer.decode(batch.tokens[row][batch.token_loss[row]])
        assert target == episode.text_target
        prompt = batch.tokens[row][batch.token_mask[row] & ~batch.token_causal[row]]
        assert bundle.tokenizer.decode(prompt) == episode.language_instruction + "\n"
    assert seen == {tuple(frame) for frame in make_frames(config)}


def test_behind_the_end_the_last_action_is_masked_or_repeated(config):
    bundle = prepare(config)
    masked, repeated = (
        make_loader(dataclasses.replace(config, after_end=how), bundle, horizon=6, batch_size=1, seed=0)
        for how in ("mask", "repeat")
    )
    cut = 0
    for position in range(len(masked.frames)):
        one, other = masked.sample(position), repeated.sample(position)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert other.action_mask.all()
        steps = one.action_mask.any(axis=1).sum()
        np.testing.assert_array_equal(
            other.actions[steps:], np.tile(other.actions[steps - 1], (6 - steps, 1))
        )
        cut += steps < 6
    assert cut >= 5, "every episode's last five frames reach behind its end"
    with pytest.raises(ValueError, match="after_end"):
        dataclasses.replace(config, after_end="pad")


def make_frames(config):
    return make_loader(config, prepare(config), horizon=1, batch_size=1, seed=0).frames


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_content_does_not_depend_on_the_number_of_hosts(config, bundle, hosts):
    whole = make_loader(config, bundle, horizon=3, batch_size=8, seed=1)
    share = 8 // hosts
    for step in (0, 1, 7, 40):
        parts = [
            make_loader(
                config, bundle, horizon=3, batch_size=8, seed=1, rows=range(host * share, (host + 1) * share)
            ).batch(step)
            for host in range(hosts)
        ]
        same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole.batch(step))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterate_equals_batch(config, bundle, workers):
    config = dataclasses.replace(config, workers=workers, threads=3, prefetch=5)
    loader = make_loader(config, bundle, horizon=3, batch_size=8, seed=1)
    iterator = loader.iterate(5)
    for step in range(5, 13):
        same(next(iterator), loader.batch(step))
    iterator.close()


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_each_frame_once_per_epoch_in_changing_order(config, bundle, batch_size):
    loader = make_loader(config, bundle, horizon=1, batch_size=batch_size, seed=0)
    count = len(loader.frames)
    epochs = [[loader.order[epoch * count + i] for i in range(count)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # The batches are that order cut into pieces; an epoch's end inside one changes nothing.
    step = count // batch_size
    rows = [loader.bundle.batch([loader.sample(step * batch_size + row)]) for row in range(batch_size)]
    same(loader.batch(step), jax.tree.map(lambda *rows: np.concatenate(rows), *rows))


def test_order_changes_with_the_seed_but_not_for_validation(config, bundle):
    def orders(split):
        loaders = [make_loader(config, bundle, horizon=1, batch_size=4, seed=s, split=split) for s in (0, 1)]
        return [[loader.order[i] for i in range(30)] for loader in loaders]

    train, val = orders("train"), orders("val")
    assert train[0] != train[1]
    assert val[0] == val[1]


def test_validation_batches_are_fixed_and_held_out(config, bundle):
    train = make_loader(config, bundle, horizon=2, batch_size=4, seed=0)
    val = make_loader(config, bundle, horizon=2, batch_size=4, seed=0, split="val")
    assert not set(train.frames[:, 0]) & set(val.frames[:, 0])
    assert len(set(val.frames[:, 0])) == 2 and len(set(train.frames[:, 0])) == 10
    for one, other in zip(val.val_batches(3), val.val_batches(3), strict=True):
        same(one, other)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=60), st.floats(0.01, 0.6))
def test_split_gives_every_task_its_share(tasks, share):
    index = DatasetIndex(fingerprint="", lengths=(1,) * len(tasks), tasks=tuple(tasks), texts=())
    train, val = split_episodes(index, DataConfig(val_share=share))
    assert sorted([*train, *val]) == list(range(len(tasks)))
    assert len(val) == max(1, round(share * len(tasks)))
    counts, held_out = collections.Counter(tasks), collections.Counter(tasks[i] for i in val)
    for task, count in counts.items():
        assert abs(held_out[task] - count * len(val) / len(tasks)) <= 1.5


def test_task_weights_set_the_shares(config, bundle, episodes):
    config = dataclasses.replace(config, task_weights=("reach:3", "push:1"))
    loader = make_loader(config, bundle, horizon=1, batch_size=16, seed=0)
    drawn = [loader.order[i] for i in range(400)]
    tasks = [episodes[loader.frames[row][0]].metadata["task"] for row in drawn]
    for start in range(0, 400, 40):  # in any stretch, not only in the long run
        assert abs(tasks[start : start + 40].count("reach") - 30) <= 1
    # Within a task each frame comes once before any comes again.
    for task in ("reach", "push"):
        rows = [row for row, name in zip(drawn, tasks) if name == task]
        count = sum(episodes[number].metadata["task"] == task for number, _ in loader.frames)
        assert len(set(rows[:count])) == count
    only = dataclasses.replace(config, task_weights=("reach:1", "push:0"))
    loader = make_loader(only, bundle, horizon=1, batch_size=16, seed=0)
    numbers = {loader.frames[loader.order[i]][0] for i in range(200)}
    assert {episodes[number].metadata["task"] for number in numbers} == {"reach"}


class TestBundle:
    def test_json_round_trip_replays(self, config, bundle):
        again = DataBundle.from_json(json.loads(json.dumps(bundle.to_json())))
        assert again == bundle
        make = dict(horizon=3, batch_size=8, seed=1)
        same(make_loader(config, again, **make).batch(2), make_loader(config, bundle, **make).batch(2))

    def test_prepare_is_repeatable_and_cached(self, config, bundle, dataset):
        names = sorted(path.name for path in (dataset / "derived").iterdir())
        assert prepare(config) == bundle
        assert sorted(path.name for path in (dataset / "derived").iterdir()) == names
        assert [name.split("-")[0] for name in names].count("tokenizer") == 1

    @pytest.mark.parametrize("group", ["dataset", "task"])
    def test_policy_sees_what_training_saw(self, config, episodes, group):
        """An observation of a recorded frame gives the training row; its actions come back in robot units."""
        bundle = prepare(dataclasses.replace(config, normalization_group=group), state_dim=3, action_dim=4)
        loader = make_loader(config, bundle, horizon=2, batch_size=6, seed=0)
        batch = loader.batch(0)
        frames = [loader.frames[loader.order[row]] for row in range(6)]
        chosen = [(episodes[number], step) for number, step in frames]
        observation = Observation(
            images={
                camera: np.stack([e.images[camera][t] for e, t in chosen]) for camera in ("top", "wrist")
            },
            state=np.stack([e.state[t] for e, t in chosen]),
            instruction=tuple(e.language_instruction for e, _ in chosen),
        )
        found = bundle.observation_batch(observation, [e.text_target for e, _ in chosen])
        same(found, batch.replace(actions=None, action_mask=None))
        prompts = bundle.observation_batch(observation)
        np.testing.assert_array_equal(prompts.token_mask, batch.token_mask & ~batch.token_causal)
        draws = np.stack([batch.actions, batch.actions], axis=1)
        robot = bundle.robot_actions(draws, observation)
        assert robot.shape == (6, 2, 2, 3)
        wanted = np.stack([chunk(e.action, t, 2)[0] for e, t in chosen])
        np.testing.assert_allclose(robot[:, 1], wanted, rtol=1e-4, atol=1e-5)

    def test_cameras(self, config):
        assert prepare(config, cameras=("wrist",)).cameras == ("wrist",)
        assert prepare(dataclasses.replace(config, cameras=("wrist", "top"))).cameras == ("wrist", "top")
        with pytest.raises(ValueError, match=r"camera 'side' is not in .*, which has \['top', 'wrist'\]"):
            prepare(dataclasses.replace(config, cameras=("side",)))

    def test_a_text_that_does_not_fit_is_found_before_training(self, config):
        with pytest.raises(
            ValueError, match=r"text of \d+ tokens is over the limit of 4: .*max_text_tokens="
        ):
            prepare(dataclasses.replace(config, max_text_tokens=4))
        with pytest.raises(
            ValueError, match=r"text target of \d+ tokens is over the limit of 2: .*max_target_tokens"
        ):
            prepare(dataclasses.replace(config, max_target_tokens=2))

    def test_one_instruction_for_two_tasks(self, tmp_path):
        toy.write(tmp_path, [toy.make_episode(seed, language_instruction="go") for seed in range(4)])
        config = DataConfig(path=str(tmp_path), normalization_group="task")
        with pytest.raises(ValueError, match=r"'go' belongs to the tasks \['push', 'reach'\]"):
            prepare(config)

    def test_a_model_that_is_too_small(self, config):
        with pytest.raises(
            ValueError, match=r"2 state dims, the model 1; use model\.expert\.state_dim=2 or more"
        ):
            prepare(config, state_dim=1)
        with pytest.raises(
            ValueError, match=r"3 action dims, the model 2; use model\.expert\.action_dim=3 or more"
        ):
            prepare(config, action_dim=2)

    def test_read_only_data(self, tmp_path, monkeypatch, caplog):
        toy.write(tmp_path, [toy.make_episode(seed) for seed in range(4)])
        (tmp_path / "derived").write_text("in the way of the directory")
        config = DataConfig(path=str(tmp_path))
        assert prepare(config) == prepare(config)
        assert "statistics is not kept beside the data" in caplog.text
        assert "tokenizer is not kept beside the data" in caplog.text


class TestErrors:
    def test_another_schema(self, tmp_path, config, bundle):
        other = dataclasses.replace(toy.SCHEMA, action_names=("dx", "dy"))
        toy.write(tmp_path, [toy.make_episode(s, schema=other) for s in range(3)], schema=other, shards=1)
        config = dataclasses.replace(config, path=str(tmp_path))
        with pytest.raises(
            ValueError, match=r"not what the model was made for .*: action 3 dims .* against 2"
        ):
            make_loader(config, bundle, horizon=1, batch_size=1, seed=0)

    def test_impossible_sizes(self, config, bundle):
        make = dict(horizon=1, batch_size=4, seed=0)
        for change in ({"horizon": 0}, {"rows": ()}, {"rows": (0, 4)}, {"rows": (-1, 0)}, {"batch_size": 0}):
            with pytest.raises(ValueError, match="impossible"):
                make_loader(config, bundle, **{**make, **change})
        with pytest.raises(ValueError, match="seed=-1"):
            make_loader(config, bundle, **{**make, "seed": -1})

    def test_splits(self, config, bundle):
        with pytest.raises(ValueError, match=r"data.val_episodes=12 leaves none of 12 episodes"):
            prepare(dataclasses.replace(config, val_episodes=12))
        none = dataclasses.replace(config, val_episodes=0)
        with pytest.raises(ValueError, match="no episodes are held out for validation"):
            make_loader(none, prepare(none), horizon=1, batch_size=1, seed=0, split="val")

    def test_task_weights(self, config, bundle):
        config = dataclasses.replace(config, task_weights=("reach:1", "pull:1"))
        with pytest.raises(ValueError, match=r"missing \['push'\], unknown \['pull'\]"):
            make_loader(config, bundle, horizon=1, batch_size=1, seed=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"val_share": 1.0}, r"data.val_share=1.0: must be in \[0, 1\)"),
            ({"val_episodes": -1}, "data.val_episodes=-1"),
            ({"vocab_size": 10}, "data.vocab_size=10: must be at least 300"),
            ({"prefetch": 0}, "data.prefetch=0: must be at least 1"),
            ({"normalization": "minmax"}, "use zscore or quantile"),
            ({"normalization_group": "robot"}, "use dataset or task"),
            ({"cameras": ("a", "a")}, "a camera is named twice"),
            ({"task_weights": ("reach",)}, "'reach' is not task:weight"),
            ({"task_weights": ("reach:-1",)}, "'reach:-1' is not task:weight"),
            ({"task_weights": ("reach:nan",)}, "'reach:nan' is not task:weight"),
            ({"task_weights": ("a:1", "a:2")}, "'a' is named twice"),
            ({"task_weights": ("a:0",)}, "all weights are 0"),
        ],
    )
    def test_config(self, change, message):
        with pytest.raises(ValueError, match=message):
            DataConfig(**change)

    def test_error_in_a_prefetch_thread_is_the_error_itself(self, tmp_path, config):
        toy.write(tmp_path, [toy.make_episode(seed) for seed in range(3)], shards=1)
        config = dataclasses.replace(config, path=str(tmp_path), val_episodes=0)
        loader = make_loader(config, prepare(config), horizon=1, batch_size=4, seed=0)
        bad = dataclasses.replace(loader.source.episode(0), png={c: (b"x",) * 99 for c in ("top", "wrist")})
        for number in range(3):
            loader.source._cache[number] = bad
        with pytest.raises(
            ValueError, match=r"episode 0 step \d+: the image of camera top cannot be decoded"
        ):
            next(loader.iterate())
